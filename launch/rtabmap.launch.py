"""Build a map with RTAB-Map: `ros2 launch kp_frontend rtabmap.launch.py left_image:=...`.

Starts the front end, the odometry, the bridge and rtabmap_slam, which must be installed. The
arguments of `odometry.launch.py` and `stereo.launch.py` work here too.
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchDescription

# RTAB-Map's own parameters are strings. These make it use our features and not detect its own.
RTABMAP = {
    "Mem/UseOdomFeatures": "true",
    "Kp/DetectorStrategy": "1",  # must equal Vis/FeatureType, else RTAB-Map drops our features
    "Vis/FeatureType": "1",
    "Rtabmap/ImagesAlreadyRectified": "true",
}


def generate_launch_description():
    share = Path(get_package_share_directory("kp_frontend"))
    arguments = {
        "namespace": ("", "namespace of the nodes"),
        "use_sim_time": ("false", "use the time of /clock, for bags and simulation"),
        "left_image": ("left/image", "topic of the left image"),
        "right_image": ("right/image", "topic of the right image"),
        "left_info": ("left/camera_info", "topic of the left camera_info"),
        "right_info": ("right/camera_info", "topic of the right camera_info"),
        "features": ("kp_frontend/features", "topic of the features"),
        "odom": ("odom", "topic of the odometry"),
        "base_frame": ("base_link", "robot frame, of the odometry and of RTAB-Map"),
        "database_path": ("~/.ros/rtabmap.db", "database file of the map"),
    }
    declared = [
        DeclareLaunchArgument(name, default_value=value, description=text)
        for name, (value, text) in arguments.items()
    ]
    images = ("left_image", "right_image", "left_info", "right_info")
    odometry = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(share / "launch" / "odometry.launch.py")),
        launch_arguments={
            name: LaunchConfiguration(name)
            for name in ("namespace", "use_sim_time", "features", "odom", "base_frame", *images)
        }.items(),
    )
    bridge = Node(
        package="kp_frontend",
        executable="rtabmap_bridge",
        name="rtabmap_bridge",
        namespace=LaunchConfiguration("namespace"),
        parameters=[{"use_sim_time": LaunchConfiguration("use_sim_time")}],
        remappings=[
            ("left/image", LaunchConfiguration("left_image")),
            ("right/image", LaunchConfiguration("right_image")),
            ("left/camera_info", LaunchConfiguration("left_info")),
            ("right/camera_info", LaunchConfiguration("right_info")),
            ("features", LaunchConfiguration("features")),
        ],
        output="screen",
    )
    rtabmap = Node(
        package="rtabmap_slam",
        executable="rtabmap",
        name="rtabmap",
        namespace=LaunchConfiguration("namespace"),
        parameters=[
            {
                "use_sim_time": LaunchConfiguration("use_sim_time"),
                "frame_id": LaunchConfiguration("base_frame"),
                "database_path": LaunchConfiguration("database_path"),
                "subscribe_rgbd": True,
                "subscribe_rgb": False,
                "subscribe_depth": False,
                "subscribe_stereo": False,
                "subscribe_odom_info": False,
                "approx_sync": False,  # all messages have the time stamp of the left image
                **RTABMAP,
            }
        ],
        remappings=[("odom", LaunchConfiguration("odom"))],
        output="screen",
    )
    return LaunchDescription([*declared, odometry, bridge, rtabmap])
