"""Start the stereo front end: `ros2 launch kp_frontend stereo.launch.py left_image:=...`."""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchDescription


def generate_launch_description():
    config = Path(get_package_share_directory("kp_frontend")) / "config"
    arguments = {
        "params_file": (str(config / "stereo.yaml"), "YAML file of parameters"),
        "dds_profile": (str(config / "fastdds_shm.xml"), "Fast DDS profile"),
        "namespace": ("", "namespace of the node"),
        "left_image": ("left/image", "topic of the left image"),
        "right_image": ("right/image", "topic of the right image"),
        "left_info": ("left/camera_info", "topic of the left camera_info"),
        "right_info": ("right/camera_info", "topic of the right camera_info"),
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
        parameters=[LaunchConfiguration("params_file")],
        remappings=[
            ("left/image", LaunchConfiguration("left_image")),
            ("right/image", LaunchConfiguration("right_image")),
            ("left/camera_info", LaunchConfiguration("left_info")),
            ("right/camera_info", LaunchConfiguration("right_info")),
        ],
        output="screen",
    )
    return LaunchDescription([*declared, *profiles, node])
