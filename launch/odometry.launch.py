"""Start front end and odometry: `ros2 launch kp_frontend odometry.launch.py left_image:=...`.

The arguments of `stereo.launch.py`, which starts the front end, work here too. `params_file` is for
both nodes; `base_frame` overrides the one in it. With `frontend:=false` only the odometry starts.
It then uses features from a recording or from another machine.
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchDescription


def odometry(context):
    """The odometry node. `base_frame` is a parameter only if it is given."""
    base_frame = LaunchConfiguration("base_frame").perform(context)
    parameters = {"use_sim_time": LaunchConfiguration("use_sim_time")}
    node = Node(
        package="kp_frontend",
        executable="stereo_odometry",
        name="stereo_odometry",
        namespace=LaunchConfiguration("namespace"),
        ros_arguments=["--params-file", LaunchConfiguration("params_file")],
        parameters=[parameters | ({"base_frame": base_frame} if base_frame else {})],
        remappings=[
            ("features", LaunchConfiguration("features")),
            ("odom", LaunchConfiguration("odom")),
        ],
        output="screen",
    )
    return [node]


def generate_launch_description():
    share = Path(get_package_share_directory("kp_frontend"))
    arguments = {
        "params_file": (str(share / "config" / "odometry.yaml"), "YAML file with parameters"),
        "namespace": ("", "namespace of the nodes"),
        "use_sim_time": ("false", "use the time of /clock, for bags and simulation"),
        "frontend": ("true", "start the front end too"),
        "features": ("kp_frontend/features", "topic of the features"),
        "odom": ("odom", "topic of the odometry"),
        "base_frame": ("", "robot frame; empty: that of params_file"),
        "odometry_rviz": ("false", "show the path and the landmarks in RViz"),
    }
    declared = [
        DeclareLaunchArgument(name, default_value=value, description=text)
        for name, (value, text) in arguments.items()
    ]
    frontend = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(share / "launch" / "stereo.launch.py")),
        launch_arguments={
            name: LaunchConfiguration(name) for name in ("params_file", "namespace", "use_sim_time")
        }.items(),
        condition=IfCondition(LaunchConfiguration("frontend")),
    )
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        namespace=LaunchConfiguration("namespace"),
        arguments=["-d", str(share / "config" / "odometry.rviz")],
        condition=IfCondition(LaunchConfiguration("odometry_rviz")),
    )
    return LaunchDescription([*declared, frontend, OpaqueFunction(function=odometry), rviz])
