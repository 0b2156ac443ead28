"""Start front end and odometry: `ros2 launch kp_frontend odometry.launch.py left_image:=...`.

The arguments of `stereo.launch.py`, which starts the front end, work here too. `params_file` is for
both nodes. With `frontend:=false` only the odometry starts. It then uses features from a recording
or from another machine.
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchDescription


def generate_launch_description():
    share = Path(get_package_share_directory("kp_frontend"))
    arguments = {
        "params_file": (str(share / "config" / "odometry.yaml"), "YAML file with parameters"),
        "namespace": ("", "namespace of the nodes"),
        "use_sim_time": ("false", "use the time of /clock, for bags and simulation"),
        "frontend": ("true", "start the front end too"),
        "features": ("kp_frontend/features", "topic of the features"),
        "odom": ("odom", "topic of the odometry"),
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
    odometry = Node(
        package="kp_frontend",
        executable="stereo_odometry",
        name="stereo_odometry",
        namespace=LaunchConfiguration("namespace"),
        ros_arguments=["--params-file", LaunchConfiguration("params_file")],
        parameters=[{"use_sim_time": LaunchConfiguration("use_sim_time")}],
        remappings=[
            ("features", LaunchConfiguration("features")),
            ("odom", LaunchConfiguration("odom")),
        ],
        output="screen",
    )
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        namespace=LaunchConfiguration("namespace"),
        arguments=["-d", str(share / "config" / "odometry.rviz")],
        condition=IfCondition(LaunchConfiguration("odometry_rviz")),
    )
    return LaunchDescription([*declared, frontend, odometry, rviz])
