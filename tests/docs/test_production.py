"""Tests of the deployment examples: time for a graceful shutdown, probes, and options that the clients know."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from kser.config import Settings
from kser.consumer.options import ConsumerOptions
from kser.embedded import EmbeddedBroker
from tests.docs.harness import PRODUCTION, killed_after_timeout, program_environment


def systemd_unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(PRODUCTION / "shop@.service")
    return parser


def environment_file() -> dict[str, str]:
    return dict(line.split("=", 1) for line in (PRODUCTION / "shop.env").read_text().splitlines())


def kubernetes_pod() -> dict[str, Any]:
    deployment = yaml.safe_load((PRODUCTION / "deployment.yaml").read_text())
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    return deployment["spec"]["template"]["spec"]


def shutdown_seconds(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the longest time that a consumer with these settings needs to end, by the formula of the page."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    options = ConsumerOptions.from_settings(Settings(), {})
    return options.shutdown_timeout + options.revoke_timeout + 10


def test_systemd_unit_leaves_time_for_a_graceful_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    service = systemd_unit()["Service"]
    assert (service["KillSignal"], service["KillMode"], service["Restart"]) == ("SIGTERM", "mixed", "on-failure")
    assert float(service["TimeoutStopSec"]) > shutdown_seconds(environment_file(), monkeypatch)
    assert Settings().client["group_id"] == "shop"
    assert Settings().topics == ["orders"]


def test_kubernetes_deployment_leaves_time_for_a_graceful_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = kubernetes_pod()["containers"]
    settings = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    assert kubernetes_pod()["terminationGracePeriodSeconds"] > shutdown_seconds(settings, monkeypatch)
    general = {"PYTHONUNBUFFERED", "LOCK_PATH", "KSER_CONFIG", "KSER_TOPICS"}
    consumer_options = {f"KSER_{field.name.upper()}" for field in fields(ConsumerOptions)}
    assert {entry["name"] for entry in container["env"]} - general <= consumer_options
    folders = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert settings["LOCK_PATH"] in folders
    volumes = {volume["name"] for volume in kubernetes_pod()["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_deployed_consumer_passes_its_probes_and_ends_at_sigterm(tmp_path: Path) -> None:
    (container,) = kubernetes_pod()["containers"]
    container_environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    probes = [container[name]["exec"]["command"] for name in ("readinessProbe", "livenessProbe")]
    with EmbeddedBroker("orders", "orders.dlq") as broker:
        environment = {
            **program_environment(tmp_path),
            **container_environment,
            "KSER_CONFIG": json.dumps({**broker.config, "api_version": "2.0", "group_id": "shop"}),
            "LOCK_PATH": str(tmp_path),
        }
        python, *script = container["command"]
        assert python == "python"
        options = {"cwd": PRODUCTION, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with (
            subprocess.Popen([sys.executable, *script], text=True, **options) as consumer,
            killed_after_timeout(consumer),
        ):
            while consumer.poll() is None and any(
                subprocess.run(probe, env=environment).returncode for probe in probes
            ):
                time.sleep(0.1)
            consumer.terminate()
            output = consumer.communicate()[0]
        assert consumer.returncode == 0, output
        assert "commit=after, workers=8, ordering=key, group=shop, topics=orders" in output


def test_kafka_python_knows_the_options_of_the_security_example() -> None:
    kafka = pytest.importorskip("kafka")
    options = json.loads((PRODUCTION / "security-python-kafka.json").read_text())
    assert options.keys() - kafka.KafkaConsumer.DEFAULT_CONFIG.keys() == set()


def test_librdkafka_accepts_the_options_of_the_security_example() -> None:
    confluent_kafka = pytest.importorskip("confluent_kafka")
    options = json.loads((PRODUCTION / "security-confluent.json").read_text())
    # The certificate of the example does not exist here, so use those of the system; and log no failed connection.
    consumer = confluent_kafka.Consumer({**options, "ssl.ca.location": "probe", "log_level": 0})
    consumer.close()
