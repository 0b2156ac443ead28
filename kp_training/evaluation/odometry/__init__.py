"""The motion of the camera, estimated from the features of each method."""
