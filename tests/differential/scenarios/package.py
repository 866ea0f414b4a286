"""Section 1: the results of `import kser`, and its effect on the environment. Each case imports in another process."""

import os
import subprocess
import sys
import textwrap

from recorder import case, emit, main, normalise

NAMES = ("LOCK_PATH", "RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE")
METRICS = ("KSER_METRICS_ENABLED", "KSER_METRICS_ADDRESS", "KSER_METRICS_PORT")

# Traces must not depend on the host name, nor on whether the Prometheus client is installed.
PREAMBLE = """
import importlib.abc, os, socket, sys
socket.gethostname = lambda: "testhost"

class NoPrometheus(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == "prometheus_client":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

sys.meta_path.insert(0, NoPrometheus())

def show(name, value):
    print(f"{name} -> {value!r}")

def environment():
    for name in NAMES:
        show(name, os.environ.get(name))

def attempt(name, function, *args):
    try:
        show(name, function(*args))
    except BaseException as error:
        print(f"{name} !! {type(error).__module__}.{type(error).__name__}: {error}")
"""


def child(code: str, **variables: str) -> None:
    """Run code after the preamble in a new interpreter, whose only environment variables of kser are the given ones."""
    environment = {k: v for k, v in os.environ.items() if k not in (*NAMES, *METRICS)} | variables
    done = subprocess.run(
        [sys.executable, "-c", f"NAMES = {(*NAMES, *METRICS)!r}\n{PREAMBLE}{textwrap.dedent(code)}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    for line in done.stdout.splitlines():
        emit(normalise(line))
    if done.returncode:
        emit("failed: " + normalise(done.stderr.splitlines()[-1]))


@case("1.version")
def the_version_is_a_string() -> None:
    child("import kser; show('version', type(kser.__version__).__name__)")


@case("1.version-without-metadata")
def the_package_is_imported_without_metadata_of_its_distribution() -> None:
    child(
        """
        import importlib.metadata as metadata
        real = metadata.Distribution.from_name.__func__
        def from_name(cls, name):
            if name == "kser":
                raise metadata.PackageNotFoundError(name)
            return real(cls, name)
        metadata.Distribution.from_name = classmethod(from_name)
        def load():
            import kser
            return isinstance(kser.__version__, str)
        attempt("import", load)
        """
    )


@case("1.distribution")
def what_the_distribution_asks_for() -> None:
    child(
        """
        # Our package may be tested without being installed, so its setup script replaces its metadata.
        script = os.environ.get("DIFFERENTIAL_SETUP")
        if script:
            import runpy, types
            setup = {}
            sys.modules["setuptools"] = types.SimpleNamespace(setup=setup.update, find_packages=lambda **options: [])
            runpy.run_path(script)
            extras, requirements = setup["extras_require"], setup["install_requires"]
        else:
            import importlib.metadata as metadata
            found = metadata.metadata("kser")
            extras = found.get_all("Provides-Extra")
            requirements = [r for r in metadata.requires("kser") if "extra ==" not in r]
        for name in ("confluent", "http", "pykafka", "prometheus", "tests", "crypto", "opentracing"):
            show(f"extra {name}", name in extras)
        for requirement in sorted(requirements):
            print(requirement)
        """
    )


@case("2.import-warnings")
def the_deprecations_of_marshmallow() -> None:
    child(
        """
        import warnings
        import cdumay_result
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import kser.schemas
        show("warnings", sorted({w.category.__name__ for w in caught}))
        """
    )


@case("1.hostname")
def the_host_name_is_taken_at_import() -> None:
    child("import kser; socket.gethostname = lambda: 'other'; show('hostname', kser.__hostname__)")


@case("1.env.defaults", "1.env.metrics-not-set")
def defaults_are_written_into_the_environment() -> None:
    child("import kser; environment()")


@case("1.env.inherited")
def children_inherit_the_defaults() -> None:
    child(
        """
        import kser, subprocess
        code = "import os; print(os.environ['RUNNING_FILE'])"
        print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
        """
    )


@case("1.env.kept")
def variables_that_are_set_are_kept() -> None:
    child("import kser; environment()", LOCK_PATH="/a", RUNNING_FILE="/b/run", LOCK_FILE="", TERMINATE_FILE="x")


@case("1.env.lock-path")
def the_lock_path_is_the_folder_of_the_three_files() -> None:
    child("import kser; environment()", LOCK_PATH="/data")


@case("1.env.lock-path-empty")
def an_empty_lock_path_gives_relative_names() -> None:
    child("import kser; environment()", LOCK_PATH="")


@case("1.env.lock-path-slash")
def a_trailing_slash_is_harmless() -> None:
    child("import kser; environment()", LOCK_PATH="/data/")


@case("1.env.read-at-use", "1.env.missing-at-use")
def the_file_variables_are_read_at_each_use() -> None:
    child(
        """
        from kser.controller import Controller
        attempt("stop", Controller.stop_processing)
        show("old", os.path.exists(os.environ["RUNNING_FILE"]))
        os.environ["RUNNING_FILE"] = os.path.join(os.environ["LOCK_PATH"], "elsewhere")
        attempt("stop", Controller.stop_processing)
        show("new", os.path.exists(os.environ["RUNNING_FILE"]))
        del os.environ["RUNNING_FILE"]
        attempt("stop", Controller.stop_processing)
        """,
        LOCK_PATH=os.getcwd(),
    )


@case("1.env.missing-at-use")
def a_consumer_needs_its_file_variables_at_each_use() -> None:
    child(
        """
        from kser.python_kafka.consumer import Consumer
        show("active", Consumer.is_active())
        show("stop", Consumer.should_stop())
        del os.environ["LOCK_FILE"], os.environ["TERMINATE_FILE"]
        attempt("active", Consumer.is_active)
        attempt("stop", Consumer.should_stop)
        """,
        LOCK_PATH=os.getcwd(),
    )


@case("1.env.controller-fallback")
def the_running_file_of_the_package_is_the_one_that_the_controller_uses() -> None:
    child(
        """
        from kser.controller import Controller
        Controller.stop_processing()
        show("files", sorted(os.listdir(os.environ["LOCK_PATH"])))
        """,
        LOCK_PATH=fresh_folder("fallback"),
    )


def fresh_folder(name: str) -> str:
    """Create an empty folder in the working directory."""
    os.mkdir(name)
    return os.path.abspath(name)


@case("1.metrics.disabled")
def metrics_are_off_by_default() -> None:
    child(
        """
        import kser
        for name in ("KSER_METRICS_ENABLED", "KSER_TASK_COUNT", "KSER_TASKS_STATUS"):
            show(name, getattr(kser, name))
        """
    )


@case("1.metrics.only-yes")
def only_one_word_enables_metrics() -> None:
    for word in ("YES", "1", "true", ""):
        child("import kser; show(kser.KSER_METRICS_ENABLED, kser.KSER_TASK_COUNT)", KSER_METRICS_ENABLED=word)


@case("1.metrics.missing-client")
def metrics_need_the_prometheus_client() -> None:
    child(
        """
        def load():
            import kser
            return kser.KSER_METRICS_ENABLED
        attempt("import", load)
        """,
        KSER_METRICS_ENABLED="yes",
    )


@case("1.metrics.copied")
def metrics_cannot_be_switched_on_after_the_import() -> None:
    child(
        """
        import kser
        from kser.entry import Entrypoint
        kser.KSER_METRICS_ENABLED = "yes"
        os.environ["KSER_METRICS_ENABLED"] = "yes"
        class Probe(Entrypoint):
            def run(self):
                return None
        show("retcode", Probe().execute().retcode)
        show("counter", kser.KSER_TASK_COUNT)
        """
    )


if __name__ == "__main__":
    main()
