"""A local cluster comes up, does its work, and leaves nothing behind, however its program ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import psutil
import pytest
from celery import Celery

from tests.support.processes import MARK, describe, guardian_pid, marked, responds
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord.cache.errors import CacheUnreachable, InvalidInput, NoWorker
from torchord.coordinator.local_cluster.cluster import LocalCluster
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, free_port
from torchord.coordinator.local_cluster.import_path import ROOT
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES

COLD = True
STUB = "tests.support.stub_app"
Start = Callable[..., LocalCluster]
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")


@pytest.fixture
def stub(cluster: Start) -> Start:
    """`cluster` with a Celery application that does not import torch, in the pool that starts quickest."""

    def start(workers: int = 1, **arguments: object) -> LocalCluster:
        return cluster(workers, **{"app": STUB, "pool": "solo", **arguments})

    return start


def add(url: str, left: int, right: int, queue: str) -> int:
    """Have a worker of the stub application add two numbers."""
    with Celery("sender", broker=url, backend=url) as app:
        result = app.send_task(f"{STUB}.add", (left, right), queue=queue)
        try:
            answer: int = result.get(timeout=PATIENCE_SECONDS)
            return answer
        finally:
            result.forget()
            app.backend.client.close()


# --- in one process -------------------------------------------------------------------


def test_the_workers_take_tasks_from_their_queues(stub: Start) -> None:
    cluster = stub(2)
    assert list(cluster.processes) == ["server", "client1", "client2"]
    assert add(cluster.url, 1, 2, UPDATES) == 3
    assert add(cluster.url, 2, 3, GRADIENTS) == 5
    assert "-Q torchord.updates -c 1" in cluster.processes["server"].command
    assert "-Q torchord.gradients -c 1" in cluster.processes["client2"].command


def test_single_layout_is_one_worker_with_every_queue(stub: Start) -> None:
    cluster = stub(layout="single")
    assert list(cluster.processes) == ["worker"]
    assert "-Q" not in cluster.processes["worker"].command
    assert add(cluster.url, 1, 2, "celery") == 3


def test_no_workers_is_the_server_alone() -> None:
    with LocalCluster(workers=0) as cluster:
        assert not cluster.processes
        assert responds(cluster.broker)
        cluster.wait_ready()


def test_stop_ends_everything_and_is_idempotent(tmp_path: Path) -> None:
    cluster = LocalCluster(workers=1, app=STUB, standby=1, queues={"client": "gradients,more"})
    cluster.stop()
    cluster.start()
    cluster.start()
    assert list(cluster.processes) == ["server", "standby1", "client1"]
    pids = [worker.pid for worker in cluster.processes.values()]
    pids += [pid for pid in (cluster.broker.pid, guardian_pid(cluster)) if pid is not None]
    scratch = cluster.processes["server"].log.parent
    assert len(pids) == 5 and scratch.is_dir()
    cluster.wait_ready()
    cluster.stop()
    cluster.stop()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert not scratch.exists()
    with pytest.raises(NoWorker, match="not running"):
        _ = cluster.url
    cluster.start()
    assert responds(cluster.broker)
    cluster.stop()


def test_kill_restart_and_add(stub: Start) -> None:
    cluster = stub(1)
    client = cluster.processes["client1"]
    client.kill()
    assert client.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    again = cluster.restart("client1")
    assert again.pid != client.pid and again.poll() is None
    more = cluster.add_worker(queues="special")
    assert more.name == "client2"
    cluster.wait_ready()
    assert add(cluster.url, 1, 2, "special") == 3
    assert cluster.restart("client2").pid != more.pid
    assert more.poll() == 0
    with pytest.raises(InvalidInput, match="client1"):
        cluster.add_worker("client1")
    with pytest.raises(InvalidInput, match="nobody"):
        cluster.restart("nobody")


def test_a_paused_worker_ends_with_the_cluster(stub: Start) -> None:
    cluster = stub(1)
    client = cluster.processes["client1"]
    process = psutil.Process(client.pid)
    client.pause()
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED, message="the pause")
    client.cont()
    wait_until(lambda: process.status() != psutil.STATUS_STOPPED, message="the end of the pause")
    client.pause()
    cluster.stop()
    assert not process.is_running()


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_pool_processes_end_with_their_worker(stub: Start, end: str) -> None:
    cluster = stub(1, pool="prefork", concurrency=2)
    client = cluster.processes["client1"]
    children = wait_until(lambda: psutil.Process(client.pid).children(), message="pool processes")
    getattr(client, end)()
    client.wait(PATIENCE_SECONDS)
    wait_until(lambda: not any(child.is_running() for child in children), message="the pool's end")


def test_the_server_comes_back_on_its_port(stub: Start, tmp_path: Path) -> None:
    cluster = stub(1, persistence_dir=tmp_path / "data")
    url = cluster.url
    cluster.broker.kill()
    assert not responds(cluster.broker)
    cluster.broker.restart()
    assert cluster.url == url
    assert add(url, 1, 2, GRADIENTS) == 3


def test_the_workers_use_this_cluster_whatever_the_shell_says(
    stub: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "recipes"))
    with monkeypatch.context() as shell:
        for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "TORCHORD_URL"):
            shell.setenv(name, "redis://production.invalid:6379/0")
        cluster = stub(1, env={"EXTRA": "1"}, checkpoint_dir=tmp_path / "here")
    environment = psutil.Process(cluster.processes["client1"].pid).environ()
    assert "CELERY_BROKER_URL" not in environment and "CELERY_RESULT_BACKEND" not in environment
    assert environment["TORCHORD_URL"] == cluster.url
    assert environment["TORCHORD_CHECKPOINT_DIR"] == str(tmp_path / "here")
    assert environment["EXTRA"] == "1"
    path = environment["PYTHONPATH"].split(os.pathsep)
    assert path[0] == str(tmp_path / "recipes"), "in the order of this program's own path"
    assert str(Path.cwd()) in path
    assert not [entry for entry in path if "site-packages" in entry or entry.endswith("lib-dynload")]
    assert add(cluster.url, 1, 2, GRADIENTS) == 3


def test_a_foreign_tasks_module_in_the_directory_is_not_taken_for_ours(
    cluster: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    started = cluster(1, app=STUB)
    assert psutil.Process(started.processes["client1"].pid).cwd() == str(tmp_path)


# --- what goes wrong ------------------------------------------------------------------


def test_a_worker_that_cannot_start_is_reported_with_its_log() -> None:
    with pytest.raises(NoWorker) as caught:
        LocalCluster(workers=1, app="no_such_application", wait_ready=True).start()
    message = str(caught.value)
    assert "exit code" in message and "celery -A no_such_application worker" in message
    assert "No module named" in message or "no_such_application" in message.split("log", 1)[1]


def test_a_worker_that_is_never_ready_is_reported(stub: Start) -> None:
    cluster = stub(1)
    cluster.restart("client1").pause()
    with pytest.raises(NoWorker, match=r"client1.*not ready after"):
        cluster.wait_ready(timeout_seconds=0.2)


def test_a_url_that_nobody_serves_starts_no_worker() -> None:
    cluster = LocalCluster(workers=1, url=f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(CacheUnreachable):
        cluster.start()
    assert guardian_pid(cluster) is None


def test_a_server_given_by_url_survives_the_cluster(stub: Start, redis_server: EmbeddedServer) -> None:
    url = redis_server.url
    cluster = stub(1, url=url)
    assert cluster.url == url and cluster.broker.pid is None
    assert add(url, 1, 2, GRADIENTS) == 3
    assert f"-n client1-{os.getpid()}@%h" in cluster.processes["client1"].command
    cluster.stop()
    assert responds(redis_server)


@pytest.mark.parametrize(
    "arguments", [{"workers": -1}, {"standby": -1}, {"concurrency": 0}, {"layout": "ring"}]
)
def test_arguments_out_of_range(arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        LocalCluster(**arguments)  # type: ignore[arg-type]


@linux_only
def test_after_the_guardian_was_killed_the_cluster_says_so_and_can_start_again(stub: Start) -> None:
    cluster = stub(1)
    workers = list(cluster.processes.values())
    processes = [psutil.Process(worker.pid) for worker in workers]
    assert guardian_pid(cluster) is not None and cluster.broker.pid is not None
    processes.append(psutil.Process(cluster.broker.pid))
    os.kill(guardian_pid(cluster), signal.SIGKILL)
    wait_until(lambda: not any(one.is_running() for one in processes), message="the end of the children")
    assert workers[0].poll() == -signal.SIGKILL
    workers[0].kill()
    with pytest.raises(NoWorker, match="guardian"):
        cluster.add_worker()
    cluster.stop()
    cluster.start()
    cluster.wait_ready()


# --- the program ends -----------------------------------------------------------------


class Program:
    """A Python program that holds a cluster, in a session of its own as a terminal would give it."""

    def __init__(self, folder: Path, body: str) -> None:
        self.mark = uuid.uuid4().hex
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        temporary = folder / f"tmp-{self.mark}"
        temporary.mkdir()
        self.temporary = temporary
        script = folder / "program.py"
        script.write_text(dedent(body))
        environment = {**os.environ, MARK: self.mark, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
        with self.stdout.open("w") as out, self.stderr.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(script)],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait_for(self, word: str) -> None:
        """Until the program has printed `word`."""
        wait_until(
            lambda: word in self.stdout.read_text() or self.process.poll() is not None,
            message=lambda: f"{word!r}; stderr: {self.stderr.read_text()}",
        )
        assert word in self.stdout.read_text(), self.stderr.read_text()

    def nothing_left(self) -> None:
        """Until no process of this program lives, and no file of it is left in the temporary directory."""
        wait_until(
            lambda: not marked(self.mark), message=lambda: "the end of\n" + describe(marked(self.mark))
        )
        assert not list(self.temporary.iterdir())


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], Program]]:
    """A function that starts a `Program`; what a failed test leaves of it is killed."""
    programs: list[Program] = []

    def start(body: str) -> Program:
        programs.append(Program(tmp_path, body))
        return programs[-1]

    yield start
    for one in programs:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        for process in marked(one.mark):
            process.kill()


HOLD = f"""
    import signal
    from torchord.coordinator.local_cluster.cluster import LocalCluster
    with LocalCluster(workers=1, app="{STUB}", pool="solo", wait_ready=True) as cluster:
        print("up", flush=True)
        signal.pause()
"""


def test_a_program_that_ends_normally(program: Callable[[str], Program]) -> None:
    one = program(HOLD.replace("signal.pause()", "pass"))
    assert one.process.wait(PATIENCE_SECONDS) == 0
    assert not marked(one.mark), "all had ended when the `with` block was left"
    one.nothing_left()
    assert one.stderr.read_text() == ""


def test_a_program_that_never_calls_stop(program: Callable[[str], Program]) -> None:
    one = program(f"""
        from torchord.coordinator.local_cluster.cluster import LocalCluster
        cluster = LocalCluster(workers=1, app="{STUB}", wait_ready=True)
        cluster.start()
    """)
    assert one.process.wait(PATIENCE_SECONDS) == 0
    one.nothing_left()
    assert one.stderr.read_text() == ""


def test_a_program_that_raises(program: Callable[[str], Program]) -> None:
    one = program(HOLD.replace("signal.pause()", "raise SystemExit(7)"))
    assert one.process.wait(PATIENCE_SECONDS) == 7
    assert not marked(one.mark)
    one.nothing_left()
    assert one.stderr.read_text() == ""


def test_ctrl_c(program: Callable[[str], Program]) -> None:
    """The terminal sends SIGINT to the foreground process group, as here."""
    one = program(HOLD)
    one.wait_for("up")
    os.killpg(one.process.pid, signal.SIGINT)
    one.process.wait(PATIENCE_SECONDS)
    assert not marked(one.mark)
    one.nothing_left()
    lines = one.stderr.read_text().splitlines()
    assert lines[-1] == "KeyboardInterrupt"
    assert [line for line in lines if line.startswith("Traceback")] == ["Traceback (most recent call last):"]


def test_ctrl_c_while_the_cluster_starts(program: Callable[[str], Program]) -> None:
    one = program(HOLD.replace("with Local", 'print("starting", flush=True)\n    with Local'))
    one.wait_for("starting")
    wait_until(lambda: len(marked(one.mark)) > 3, message="the first workers")
    os.killpg(one.process.pid, signal.SIGINT)
    one.process.wait(PATIENCE_SECONDS)
    one.nothing_left()
    assert one.stderr.read_text().splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_killed(program: Callable[[str], Program], number: signal.Signals) -> None:
    one = program(HOLD.replace("solo", "prefork"))
    one.wait_for("up")
    assert len(marked(one.mark)) >= 7  # the program, the guardian, the server, two workers with a child each
    one.process.send_signal(number)
    assert one.process.wait(PATIENCE_SECONDS) == -number
    one.nothing_left()
    assert one.stderr.read_text() == ""


def test_a_killed_program_whose_fork_holds_the_pipe_open(program: Callable[[str], Program]) -> None:
    """A forked data loader inherits the guardian's pipe: its end does not come, a new parent id does."""
    one = program(
        HOLD.replace(
            "signal.pause()",
            'import os\n        if os.fork() == 0: signal.pause()\n        print("forked"); signal.pause()',
        )
    )
    one.wait_for("forked")
    one.process.kill()
    one.process.wait(PATIENCE_SECONDS)
    wait_until(lambda: len(marked(one.mark)) == 1, message=lambda: describe(marked(one.mark)))
    (fork,) = marked(one.mark)
    assert "program.py" in " ".join(fork.cmdline())
    fork.kill()
    one.nothing_left()


def test_a_fork_that_leaves_the_block_stops_nothing(program: Callable[[str], Program]) -> None:
    one = program(f"""
        import os
        from torchord.cache.servers.redis_client import process_id
        from torchord.coordinator.local_cluster.cluster import LocalCluster
        parent = os.getpid()
        with LocalCluster(workers=1, app="{STUB}", wait_ready=True) as cluster:
            fork = os.fork()
            if fork:
                os.waitpid(fork, 0)
                workers = cluster.processes.values()
                print("alive" if all(one.poll() is None for one in workers) else "ended")
                print("answers" if process_id(cluster.url) == cluster.broker.pid else "silent")
    """)
    assert one.process.wait(PATIENCE_SECONDS) == 0
    assert one.stdout.read_text().split() == ["alive", "answers"]
    one.nothing_left()


@linux_only
def test_program_and_guardian_killed_at_once(program: Callable[[str], Program]) -> None:
    one = program(HOLD.replace('"up"', '"up", cluster._guardian.pid'))
    one.wait_for("up")
    wait_until(lambda: one.stdout.read_text().endswith("\n"))
    guardian = int(one.stdout.read_text().split()[1])
    os.kill(one.process.pid, signal.SIGSTOP)  # so that it cannot react to the guardian's end
    os.kill(guardian, signal.SIGKILL)
    one.process.kill()
    one.process.wait(PATIENCE_SECONDS)
    wait_until(lambda: not marked(one.mark), message=lambda: describe(marked(one.mark)))


def test_importing_the_cluster_is_quick_and_light() -> None:
    code = (
        "import sys; from torchord import LocalCluster; print({'torch', 'redis', 'celery'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("set()", "")
