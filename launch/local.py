"""Starts ranks on this machine through torch's elastic launcher."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from minitron_megatron.process import STACKS
from minitron_megatron.process_tree import ending_descendants

ROLE = "minitron"
"""Role that the launcher gives each rank. Such ranks leave printing errors to `launch.agent`."""

COMMAND = "MINITRON_COMMAND_PID"
"""Environment variable that tells the launcher for which process it starts ranks, and ends with it."""

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run_ranks(num_ranks: int, arguments: list[str]) -> int:
    """Runs `minitron ARGUMENTS` on `num_ranks` local ranks and waits for them.

    Forwards signals to the ranks. They run in a session of their own, so that a terminal's Ctrl-C reaches them only
    once. Whoever of them dies, none is left.

    Args:
        num_ranks: processes to start.
        arguments: the command line, verb first.

    Returns:
        exit status: 2 if a rank raised a `UserError`, whose message has been printed.
    """
    # The cores that this process may use, if the system can tell.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command = [
        *(sys.executable, "-m", "minitron_megatron.launch.agent"),
        *("--standalone", "--role", ROLE, "--nproc-per-node", str(num_ranks)),
        *("-m", "minitron_megatron.cli", *arguments),
    ]
    environment = {"OMP_NUM_THREADS": str(max(1, cores // num_ranks)), **os.environ, COMMAND: str(os.getpid())}
    with tempfile.TemporaryDirectory(prefix="minitron-stacks-") as stacks, ending_descendants():
        agent = subprocess.Popen(command, env={**environment, STACKS: stacks}, start_new_session=True)
        previous = {number: signal.signal(number, lambda got, _: agent.send_signal(got)) for number in _FORWARDED}
        try:
            status = agent.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            # Each in one piece: ranks that write at the same time would mix theirs.
            for text in (file.read_text(errors="replace") for file in sorted(Path(stacks).iterdir())):
                if text.count("\n") > 1:  # more than its head
                    print(text, file=sys.stderr, flush=True)
    if status == -signal.SIGKILL:
        where = f"pid {agent.pid} on {socket.gethostname()}"
        print(f"minitron: the launcher of the ranks ({where}) was killed by SIGKILL", file=sys.stderr)
    return 128 - status if status < 0 else status
