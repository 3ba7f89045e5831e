"""two processes that train together, as torchrun starts them; without a second import of torch
where a process can be forked."""
import multiprocessing
import os
import socket
import sys

import torch

import common


def work(main, argv, rank, port, log):
    """a process's part: like `python SCRIPT ..` with torchrun's variables, its output in files"""
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=port)
    torch.set_num_threads(1)
    sys.argv = argv
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = open(f"{log}.{name}", "w", encoding="utf-8", buffering=1)
        os.dup2(stream.fileno(), number)       # libraries write there
        setattr(sys, name, stream)
    common.run(main)


def run_two(main, argv, log):
    """-> of rank 0 and rank 1 each (exit code, standard output, standard error)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # with a GPU, autograd has threads, which a fork lacks
    can_fork = sys.platform == "linux" and not torch.accelerator.is_available()
    context = multiprocessing.get_context("fork" if can_fork else "spawn")
    workers = []
    for rank in "01":
        where = f"{log}.{rank}"
        worker = context.Process(target=work, args=(main, [*map(str, argv)], rank, port, where))
        worker.start()
        workers.append((worker, where))
    said = []
    for worker, where in workers:
        worker.join(120)
        worker.kill()                          # of no effect on one that has ended
        worker.join()
        texts = []
        for name in ("stdout", "stderr"):
            with open(f"{where}.{name}", encoding="utf-8") as file:
                texts.append(file.read())
        said.append((worker.exitcode, *texts))
    return said
