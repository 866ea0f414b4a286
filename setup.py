"""Metadata of the distribution. pyproject.toml contains the settings of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"$',
    (HERE / "kser" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)
assert VERSION is not None, "kser/__init__.py declares no __version__"

FLASK = ["flask>=2.3"]
EMBEDDED = ["confluent-kafka>=2.16"]
# kafka-python decodes snappy, lz4 and zstd with these packages. librdkafka contains these codecs.
CODECS = ["lz4>=3.1", "python-snappy>=0.6.1", "zstandard>=0.21"]
SQL = ["sqlalchemy>=2.0", "alembic>=1.13"]
POSTGRESQL = [*SQL, "psycopg[binary]>=3.1.8"]

setup(
    name="kser",
    version=VERSION.group(1),
    description="Run tasks and operations (linear sequences of tasks) on Apache Kafka consumers",
    long_description=(HERE / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    license="BSD-3-Clause",
    packages=find_packages(include=["kser", "kser.*"]),
    package_data={"kser": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "cdumay-error>=0.2",
        "cdumay-result>=0.1.12",
        "marshmallow>=3.18,<4",
        "kafka-python>=2.3,<4",
        "blinker>=1.6.2",
        # kafka-python uses crc32c for the checksum of each record. Without crc32c, checksums take most of its time.
        "crc32c>=2.4",
    ],
    extras_require={
        "flask": FLASK,
        "embedded": EMBEDDED,
        "codecs": CODECS,
        "sql": SQL,
        "postgresql": POSTGRESQL,
        "tests": [
            *FLASK,
            *EMBEDDED,
            *CODECS,
            *POSTGRESQL,
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "coverage[toml]>=7.10",
            "build>=1.2",
            "pyyaml>=6",
            "tox>=4.15",
        ],
        "docs": ["sphinx>=7.3", "furo>=2024.5.6"],
        # Keep these names, because 0.8.27 published them as extras (decision A3).
        "confluent": EMBEDDED,
        "http": ["cdumay-rest-client>=0.1"],
        "pykafka": [],
        "prometheus": ["prometheus-client>=0.20"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Framework :: Flask",
        "Intended Audience :: Developers",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
)
