"""A process that saves without end, killed at random moments: what the tests of whole saves look at afterwards."""

import os
import random
import signal
import subprocess
import sys
import time

LOOP = """
save()
print("ready", flush=True)
for _ in sys.stdin:
    writer = os.fork()
    while not writer:
        save()
    print(writer, flush=True)
    os.waitpid(writer, 0)
"""


def killed(script, folder, longest, times=100):
    """Yield after each of `times` kills, at most `longest` seconds after the saving began; `script` defines `save()`
    and finds `folder` in `sys.argv[1]`."""
    dice, tests = random.Random(0), os.path.dirname(__file__)
    words = [sys.executable, "-c", f"import os, sys\nsys.path.insert(0, {tests!r})\n{script}{LOOP}", str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as saves:
        assert saves.stdout.readline() == "ready\n"
        for _ in range(times):
            saves.stdin.write("again\n")
            writer = int(saves.stdout.readline())
            time.sleep(0.01 + (longest - 0.01) * dice.random())
            os.kill(writer, signal.SIGKILL)
            yield
        saves.stdin.close()
