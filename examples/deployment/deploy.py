"""Run the app of this folder on a SuperLink and SuperNodes of this machine, with Flower's commands.

This script makes certificates and keys, starts a SuperLink and several SuperNodes, runs the app,
and ends every process. It prints the commands that it runs, so that they can be copied. It exits
with 1 if the run failed.
"""

import argparse
import contextlib
import json
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
sys.path.append(str(HERE.parent))

from launch import START_SECONDS, Launcher, exit_with  # noqa: E402

CONNECTION = "deployment"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--num-edges", type=int, default=3, help="SuperNodes (default: 3)")
    parser.add_argument(
        "--port", type=int, default=48000, help="of the SuperLink; SuperNodes take the next ones"
    )
    parser.add_argument(
        "--insecure", action="store_true", help="no TLS, no authentication: for trying only"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="keeps keys, logs, results and checkpoint; default: a temporary one",
    )
    parser.add_argument(
        "--run-config", default="", metavar="KEYS", help='as for `flwr run`: "seed=1 timeout=60.0"'
    )
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="flwr-"))
        )
        folder = folder.absolute()
        launcher = stack.enter_context(Launcher(folder, echo=True))
        federation = Federation(
            launcher, folder, port=arguments.port, secure=not arguments.insecure
        )
        names = [f"edge-{index}" for index in range(arguments.num_edges)]
        federation.make_keys(names)
        federation.start_superlink()
        for index, name in enumerate(names):
            federation.register(name)
            federation.start_supernode(name, index, arguments.num_edges)
        federation.wait_for_supernodes(arguments.num_edges)
        results = folder / "results"
        config = f'num-edges={arguments.num_edges} results="{results}" {arguments.run_config}'
        if arguments.folder is not None:
            # A checkpoint in a temporary folder could never be resumed from.
            config += f' checkpoint="{folder / "core.ckpt"}"'
        command = ["flwr", "run", str(HERE), CONNECTION, "--stream", "--run-config", config]
        run_id, _, _ = launcher.stream(command)
        status = federation.status(run_id) if run_id else "not started"
        print(f"\nRun {run_id}: {status}")
        if status != "finished:completed":
            return 1
        print((results / "summary.json").read_text(), end="")
    return 0


class Federation:
    """A SuperLink and SuperNodes on this machine.

    Args:
        launcher: runs them.
        folder: absolute; gets `keys` and the SuperLink's database.
        port: of the SuperLink; the n-th SuperNode to start takes `port + n`.
        secure: TLS and SuperNode authentication.
    """

    def __init__(self, launcher: Launcher, folder: Path, *, port: int, secure: bool = True) -> None:
        self.launcher = launcher
        self.keys = folder / "keys"
        self._database = folder / "superlink.db"
        self._port = port
        self._secure = secure
        self._num_supernodes = 0

    def make_keys(self, names: Sequence[str]) -> None:
        """Make certificates and SuperNode keys that are not there yet."""
        if self._secure:
            supernodes = [word for name in names for word in ("--supernode", name)]
            script = str(HERE / "keys.py")
            self.launcher.call([sys.executable, script, str(self.keys), *supernodes])

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers.

        Raises:
            RuntimeError: if it does not answer, with the end of its log, or if the port is taken.
        """
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                raise RuntimeError(f"port {self._port}: expected it to be free, got an answer")
        command: list[object] = ["flower-superlink", "--host", "127.0.0.1", "--port", self._port]
        command += ["--database", self._database]
        if self._secure:
            command += ["--ssl-ca-certfile", self.keys / "ca.crt"]
            command += ["--ssl-certfile", self.keys / "superlink.crt"]
            command += ["--ssl-keyfile", self.keys / "superlink.key", "--enable-supernode-auth"]
            trust = f'root-certificates = "{self.keys / "ca.crt"}"'
            context = ssl.create_default_context(cafile=self.keys / "ca.crt")
        else:
            command += ["--insecure"]
            trust = "insecure = true"
            context = None
        self._write_connection(trust)
        self.launcher.start("superlink", command)
        url = f"{'https' if self._secure else 'http'}://127.0.0.1:{self._port}/health"
        self.launcher.wait_for_health("superlink", url, context)

    def register(self, name: str) -> None:
        """Admit a SuperNode by its public key; without authentication every SuperNode is."""
        if not self._secure:
            return
        key = str(self.keys / f"{name}.pub")
        try:
            self.launcher.call(["flwr", "supernode", "register", key, CONNECTION, "--name", name])
        except RuntimeError as error:
            # The database of a folder used before has it.
            if "Public key already in use" not in str(error):
                raise

    def start_supernode(
        self, name: str, partition: int, num_partitions: int, **node_config: Any
    ) -> None:
        """Start a SuperNode that holds one part of the data; more of its node config by keyword."""
        self._num_supernodes += 1
        config = {"name": name, "partition-id": partition, "num-partitions": num_partitions}
        config |= node_config
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        command: list[object] = ["flower-supernode", "--superlink", f"127.0.0.1:{self._port}"]
        command += ["--port", self._port + self._num_supernodes, "--node-config", pairs]
        if self._secure:
            command += ["--root-certificates", self.keys / "ca.crt"]
            command += ["--auth-supernode-private-key", self.keys / name]
        else:
            command += ["--insecure"]
        self.launcher.start(name, command)

    def supernodes(self) -> list[dict[str, Any]]:
        """List the SuperNodes that the SuperLink knows, with their "status"."""
        return list(self.launcher.query(["flwr", "supernode", "list", CONNECTION])["nodes"])

    def wait_for_supernodes(self, count: int) -> None:
        """Wait until so many SuperNodes are online.

        Raises:
            RuntimeError: if they are not in time, or if a process ended.
        """
        deadline = time.monotonic() + START_SECONDS
        while sum(node["status"] == "online" for node in self.supernodes()) < count:
            for name in self.launcher.processes:
                self.launcher.check(name, deadline)
            time.sleep(1.0)

    def submit(self, app: Path, run_config: str) -> str:
        """Start a run without waiting for it and return its id."""
        command = ["flwr", "run", str(app), CONNECTION, "--run-config", run_config]
        return str(self.launcher.query(command)["run-id"])

    def status(self, run_id: str) -> str:
        """Return "finished:completed", "finished:failed", "running", ..."""
        return self.launcher.status(run_id, CONNECTION)

    def _write_connection(self, trust: str) -> None:
        text = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{self._port}"\n{trust}\n'
        path = self.launcher.home / "config.toml"
        self.launcher.say(f"cat > {path} <<'END'\n{text}END")
        path.write_text(text)


if __name__ == "__main__":
    exit_with(main, "Interrupted: the run, its SuperNodes and the SuperLink were ended")
