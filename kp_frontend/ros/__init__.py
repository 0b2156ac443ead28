"""Everything that knows of ROS: the node and the conversion to messages."""
