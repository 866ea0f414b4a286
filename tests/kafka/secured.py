"""An Apache Kafka with logins, certificates and access control lists, for tests of a client's trouble.

Each listener has its own port: ``PLAINTEXT`` for the administration, which may do everything; ``SASL`` with the
mechanisms PLAIN and SCRAM-SHA-256; ``TLS`` with a certificate that its own authority signed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from tests.kafka.broker import PROPERTIES, START_SECONDS, KafkaBroker, free_ports, new_cluster

USER, PASSWORD = "alice", "alice-secret"

_SECURED = """\
listeners={addresses}
advertised.listeners={addresses}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_PLAINTEXT,TLS:SSL
listener.name.sasl.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256
listener.name.sasl.plain.sasl.jaas.config={login}.plain.PlainLoginModule required user_{user}="{password}";
listener.name.sasl.scram-sha-256.sasl.jaas.config={login}.scram.ScramLoginModule required;
listener.name.tls.ssl.keystore.type=PEM
listener.name.tls.ssl.keystore.location={folder}/server.pem
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"""


class SecuredKafka(KafkaBroker):
    """An Apache Kafka with logins, certificates and access control lists.

    A client without a login is an administrator. The user :data:`USER` may do what :meth:`grant` allows.
    """

    def __init__(self) -> None:
        port, controller_port, self.sasl_port, self.tls_port = free_ports(4)
        ports = {"PLAINTEXT": port, "CONTROLLER": controller_port, "SASL": self.sasl_port, "TLS": self.tls_port}
        settings = _SECURED.format(
            addresses=",".join(f"{name}://127.0.0.1:{number}" for name, number in ports.items()),
            login="org.apache.kafka.common.security",
            user=USER,
            password=PASSWORD,
            folder="{folder}",
        )
        names = {line.partition("=")[0] for line in settings.splitlines()}
        plain = PROPERTIES.format(port=port, controller_port=controller_port, folder="{folder}")
        kept = [line for line in plain.splitlines() if line.partition("=")[0] not in names]
        self._prepare(port, "\n".join([*kept, settings]))
        try:
            self.authority = make_certificate(self.folder)
            self._format(
                new_cluster(), "--standalone", "--add-scram", f"SCRAM-SHA-256=[name={USER},password={PASSWORD}]"
            )
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def sasl(self) -> str:
        """The address of the listener with logins."""
        return f"127.0.0.1:{self.sasl_port}"

    @property
    def tls(self) -> str:
        """The address of the listener with a certificate."""
        return f"127.0.0.1:{self.tls_port}"

    def grant(self, kind: ResourceType, name: str, *operations: AclOperation) -> None:
        """Allow operations on a resource to the user."""
        bindings = [self._acl(kind, name, operation) for operation in operations or (AclOperation.ALL,)]
        client = self._admin_client()
        for granted in client.create_acls(bindings).values():
            granted.result(START_SECONDS)

    def deny(self, kind: ResourceType, name: str) -> None:
        """Take all permissions on a resource from the user."""
        chosen = AclBindingFilter(
            kind,
            name,
            ResourcePatternType.LITERAL,
            f"User:{USER}",
            None,
            AclOperation.ANY,
            AclPermissionType.ANY,
        )
        client = self._admin_client()
        for deleted in client.delete_acls([chosen]).values():
            deleted.result(START_SECONDS)

    def _admin_client(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap_servers})

    @staticmethod
    def _acl(kind: ResourceType, name: str, operation: AclOperation) -> AclBinding:
        return AclBinding(
            kind, name, ResourcePatternType.LITERAL, f"User:{USER}", "*", operation, AclPermissionType.ALLOW
        )


def make_certificate(folder: Path) -> Path:
    """Write ``server.pem`` (key and certificate for 127.0.0.1) to a folder, and return the file that verifies it."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    (folder / "server.pem").write_text(key.read_text() + certificate.read_text())
    return certificate
