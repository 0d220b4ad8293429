"""Kernels that start at once, for running many chapters one after the other.

Most chapters spend more time on importing PyTorch and diffusers than on their own cells. `serve`
imports them once, and forks a new process for each kernel; `kernel` stands for one of these where
Jupyter expects a process of its own, and they live and die together. A kernel knows no name that
its chapter has not imported; only the modules behind the names are there already.

    python warm.py serve ADDRESS
    python warm.py kernel ADDRESS -f CONNECTION_FILE ...
"""

import json
import os
import signal
import socket
import sys
import threading
import time

MODULES = (
    "IPython", "ipykernel.kernelapp", "ipywidgets", "torch", "diffusers.models.unets.unet_2d",
    "diffusers.pipelines.ddim.pipeline_ddim", "pandas", "sklearn.datasets", "seaborn",
)


def serve(address):
    "Fork a kernel for each who asks, until this process is ended."
    for name in MODULES:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            asked, _ = server.accept()
            if os.fork() == 0:
                server.close()
                become_kernel(asked)
            asked.close()


def become_kernel(asked):
    "In the new process: be the kernel that was asked for, as long as the asker lives."
    from ipykernel.kernelapp import launch_new_instance

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with asked.makefile() as lines:
        order = json.loads(lines.readline())
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    # A process that is started anew has read this for itself.
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    asked.sendall(f"{os.getpid()}\n".encode())

    def end_with_the_asker():
        asked.recv(1)
        os._exit(1)

    threading.Thread(target=end_with_the_asker, daemon=True).start()
    launch_new_instance(argv=order["arguments"])
    os._exit(0)


def kernel(address, *arguments):
    "Ask for a kernel, pass signals on to it, and end with it."
    asking = socket.socket(socket.AF_UNIX)
    for _ in range(600):
        try:
            asking.connect(address)
            break
        except OSError:  # it is still importing
            time.sleep(0.1)
    order = {
        "folder": os.getcwd(), "environment": dict(os.environ), "arguments": list(arguments),
    }
    asking.sendall(json.dumps(order).encode() + b"\n")
    with asking.makefile() as lines:
        process = int(lines.readline())
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, lambda number, _: os.kill(process, number))
        lines.readline()


if __name__ == "__main__":
    {"serve": serve, "kernel": kernel}[sys.argv[1]](*sys.argv[2:])
