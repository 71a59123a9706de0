"""Starts ranks on this machine through torch's elastic launcher."""

import os
import signal
import subprocess
import sys

ROLE = "minitron"
"""Role that the launcher gives each rank. Such ranks leave printing errors to `launch.agent`."""

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run_ranks(num_ranks: int, arguments: list[str]) -> int:
    """Runs `minitron ARGUMENTS` on `num_ranks` local ranks and waits for them.

    Forwards signals to the ranks. They run in a session of their own, so that a terminal's Ctrl-C reaches them only
    once.

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
    environment = {"OMP_NUM_THREADS": str(max(1, cores // num_ranks)), **os.environ}
    agent = subprocess.Popen(command, env=environment, start_new_session=True)
    previous = {number: signal.signal(number, lambda got, _: agent.send_signal(got)) for number in _FORWARDED}
    try:
        status = agent.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status
