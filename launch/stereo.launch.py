"""Start the stereo front end: `ros2 launch kp_frontend stereo.launch.py left_image:=...`.

The node is a managed (lifecycle) node. With `autostart:=true` (the default) it configures and
activates itself. With `autostart:=false` it waits for a lifecycle manager or `ros2 lifecycle set`.
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchDescription


def generate_launch_description():
    config = Path(get_package_share_directory("kp_frontend")) / "config"
    arguments = {
        "params_file": (str(config / "stereo.yaml"), "YAML file with parameters"),
        "dds_profile": (str(config / "fastdds_shm.xml"), "Fast DDS profile"),
        "namespace": ("", "namespace of the node"),
        "autostart": ("true", "configure and activate the node; false: a lifecycle manager does"),
        "use_sim_time": ("false", "use the time of /clock, for bags and simulation"),
        "left_image": ("left/image", "topic of the left image"),
        "right_image": ("right/image", "topic of the right image"),
        "left_info": ("left/camera_info", "topic of the left camera_info"),
        "right_info": ("right/camera_info", "topic of the right camera_info"),
        "rviz": ("false", "show matches and points in RViz"),
        "frame": ("left_camera_optical_frame", "frame of the left images, for RViz"),
    }
    declared = [
        DeclareLaunchArgument(name, default_value=value, description=text)
        for name, (value, text) in arguments.items()
    ]
    profiles = [
        SetEnvironmentVariable(name, LaunchConfiguration("dds_profile"))
        for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
    ]
    node = Node(
        package="kp_frontend",
        executable="stereo_node",
        name="kp_frontend",
        namespace=LaunchConfiguration("namespace"),
        # Not in `parameters`: launch ignores a file there that does not exist.
        ros_arguments=["--params-file", LaunchConfiguration("params_file")],
        parameters=[
            {
                "autostart": LaunchConfiguration("autostart"),
                "use_sim_time": LaunchConfiguration("use_sim_time"),
            },
        ],
        remappings=[
            ("left/image", LaunchConfiguration("left_image")),
            ("right/image", LaunchConfiguration("right_image")),
            ("left/camera_info", LaunchConfiguration("left_info")),
            ("right/camera_info", LaunchConfiguration("right_info")),
        ],
        output="screen",
    )
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        namespace=LaunchConfiguration("namespace"),
        arguments=["-d", str(config / "stereo.rviz"), "-f", LaunchConfiguration("frame")],
        condition=IfCondition(LaunchConfiguration("rviz")),
    )
    return LaunchDescription([*declared, *profiles, node, rviz])
