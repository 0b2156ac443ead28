import re
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'__version__ = "(.+)"', Path("kp_frontend/__init__.py").read_text())[1]
share = "share/kp_frontend"

setup(
    name="kp_frontend",
    version=version,
    description="Stereo feature front end for ROS 2, with its training and evaluation",
    author="kp_frontend developers",
    author_email="maintainers@kp-frontend.example",
    license="Apache-2.0",
    packages=find_packages(include=["kp_frontend*", "kp_training*"]),
    package_data={
        "kp_frontend": ["weights/*.safetensors", "weights/*.md"],
        "kp_training": ["config/*.yaml"],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/kp_frontend"]),
        (share, ["package.xml"]),
        (f"{share}/launch", glob("launch/*.launch.*")),
        (f"{share}/config", glob("config/*")),
    ],
    zip_safe=False,
    python_requires=">=3.10",
    extras_require={"test": ["hypothesis", "pytest"]},  # colcon test then runs pytest
    entry_points={
        "console_scripts": [
            "kp = kp_frontend.cli:main",
            "stereo_node = kp_frontend.ros.__main__:main",
            "stereo_odometry = kp_frontend.ros.odometry_node:main",
            "rtabmap_bridge = kp_frontend.ros.rtabmap_bridge:main",
        ],
    },
)
