"""
reproduce.py: the paper in miniature. Trains and measures most of what README.md quotes, and draws its figures.

    python results/reproduce.py --scale tiny                  2 CPU cores, one seed
    python results/reproduce.py --scale gpu --prose TEXT      one CUDA GPU, three seeds, all parts
    python results/reproduce.py --scale gpu --part effect     some: effect, entropy, ablation, extend, deep, speed, cost, nanogpt
    python results/reproduce.py --scale gpu --part tables     only tables.md and the figures, from the rows that are there

Parts   effect    MTP and MTP-D at K = 1 and K = 4, on Python source and (with --prose) on prose
        entropy   acceptance of the K = 4 models of effect, by the entropy of the main head
        ablation  the paper's ablation at K = 1: start, detach, N, beta, direction, where the gradient goes
        extend    the K = 4 models looped to 8 and to 16 heads
        deep      MTP-D at K = 4 with three times the layers, for decoding
        speed     decoding with 0 .. 16 heads, of the deep models, and in batches
        cost      time and memory of training steps (needs the machine to itself)
        nanogpt   the shakespeare preset, as a plain GPT and with 4 heads

Every run is a row of results/SCALE/runs.jsonl with its command, seed, result and hardware; a run that has a row is not
run again, so an interrupted call goes on where it stopped. Checkpoints go to --work (out/reproduce); entropy, extend and speed
read them, and make those again that are gone. --prose takes a text file (its vocabulary is trained here) or a prepared folder.
"""

import argparse
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import tables  # noqa: E402
import torch  # noqa: E402

from common import git_commit  # noqa: E402

MODEL = {
    "tiny": "--preset tiny --eval_windows 200",
    "gpu": "--preset small --n_layer 8 --n_head 6 --n_embd 384 --block_size 256 --batch_size 32 --micro_batch 32 --steps 1000 "
           "--warmup 100 --lr 1.5e-3 --eval_windows 400 --compile blocks --log_every 100",
}
SEEDS = {"tiny": (1,), "gpu": (1, 2, 3)}
PAPER = "--kl_start 0 --kl_ramp 0"             # the KL from the first step, as in the paper
ABLATION = {                                   # K = 1; what differs from the default recipe
    "default": "", "MTP": "--beta 0", "paper: KL from step 0": PAPER, "start 0.5": "--kl_start 0.5",
    "no detach": "--no-detach_teacher", "no detach, step 0": "--no-detach_teacher " + PAPER,
    "N = V": "--top_n 1000000", "N = 0.8 %": "--top_n 0.008", "N = 16": "--top_n 16", "N = 1": "--top_n 1",
    "beta 0.3": "--beta 0.3", "beta 1.5": "--beta 1.5", "reverse KL": "--kl reverse", "total variation": "--kl tv",
    "KL into heads only": "--kl_grad heads", "heads only, step 0, clipped apart": f"--kl_grad heads --clip_apart {PAPER}",
}
TWINS = {"default": "MTP-D", "MTP": "MTP"}     # rows of the ablation that the part effect has made already
EXTEND_STEPS = {"tiny": "", "gpu": "--steps 200 --compile off"}


class Runner:
    """runs commands side by side, a row of runs.jsonl for each"""

    def __init__(self, scale, work, parallel):
        self.folder, self.work, self.parallel, self.lock = ROOT / "results" / scale, Path(work), parallel, threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "runs.jsonl"
        self.rows, self.failed, self.makers = tables.read(self.path), 0, {}       # makers: the job that writes a folder
        self.gpus = torch.cuda.device_count()
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with open(self.path, "a", encoding="utf-8") as file:     # after a half line, the next row begins its own
                file.write("\n")

    def add(self, **row):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        row = dict(row, device=device, torch=torch.__version__, python=platform.python_version(), commit=git_commit())
        with self.lock:
            self.rows.append(row)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def has(self, name):
        return any(row["name"] == name for row in self.rows)

    def run(self, name, part, command, gpu=0, **labels):
        """one command that prints JSON on its last line"""
        if self.has(name):
            return
        begin = time.time()
        done = self.call(command, gpu)
        if done.returncode:
            self.failed += 1
            print(f"{name} FAILED: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            return
        result = json.loads(done.stdout.strip().splitlines()[-1])
        self.add(name=name, part=part, command="python " + " ".join(c.replace(str(ROOT) + os.sep, "") for c in command), seconds=round(time.time() - begin, 1),
                 result=shorten(result), **labels)
        brief = result.get("after", result) if isinstance(result, dict) else {}
        print(f"{name}: {time.time() - begin:.0f} s" + (f", main loss {brief['loss'][0]:.4f}, CAR {[round(x, 3) for x in brief['car']]}" if "car" in brief else ""), flush=True)

    def call(self, command, gpu=0):
        """a process of its own"""
        mine = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else range(self.gpus)
        one = {"CUDA_VISIBLE_DEVICES": str(mine[gpu])} if self.gpus > 1 else {}
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, encoding="utf-8", cwd=ROOT, env={**os.environ, **one})

    def side_by_side(self, function, jobs, each):
        """function(job, gpu) for all jobs, `each` at a time on each GPU"""
        lanes = queue.Queue()
        for gpu in list(range(max(1, self.gpus))) * each:
            lanes.put(gpu)

        def work(job):
            gpu = lanes.get()
            try:
                function(job, gpu)
            finally:
                lanes.put(gpu)

        with ThreadPoolExecutor(lanes.qsize()) as pool:
            list(pool.map(work, jobs))

    def all(self, jobs, each=None):
        """jobs (name, part, command, labels); each=1 for those that are timed"""
        jobs = [job for job in jobs if not self.has(job[0])]
        self.restore(jobs)
        self.side_by_side(lambda job, gpu: self.run(*job[:3], gpu=gpu, **job[3]), jobs, each or self.parallel)

    def restore(self, jobs):
        """make the checkpoints again that these jobs read, that have a row and whose files are gone: runs.jsonl travels,
        checkpoints do not. No new row"""
        needed = {Path(c).parent for job in jobs for c in job[2] if c.endswith("ckpt.pt") and not (ROOT / c).exists()}
        gone = [self.makers[folder] for folder in sorted(needed) if folder in self.makers and self.has(self.makers[folder][0])]
        if gone:
            self.restore(gone)
            print(f"making {len(gone)} checkpoints again: {', '.join(job[0] for job in gone)}", flush=True)
            self.side_by_side(lambda job, gpu: self.call(job[2], gpu), gone, self.parallel)


def shorten(value):
    """numbers to 5 significant digits: logs are kept small"""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: shorten(v) for k, v in value.items()}
    return [shorten(v) for v in value] if isinstance(value, list) else value


def train_job(args, scale, work, name, part, data, seed, more, **labels):
    out = Path(work) / name.replace(" ", "_").replace("/", "_").replace("%", "p").replace(":", "").replace("=", "").replace(",", "")
    command = ["train.py", *MODEL[scale].split(), "--eval_every", "100000", "--data", data, "--seed", str(seed), "--out", str(out), *more.split(), "--json"]
    return name, part, command, dict(seed=seed, data=Path(data).name, **labels)


def effect_jobs(args, runner, sources):
    jobs = []
    for text, (data, extra) in sources.items():
        for K, beta in ((4, 0.5), (1, 1.0)):
            for method in ("MTP", "MTP-D"):
                for seed in SEEDS[args.scale]:
                    more = f"{extra} --n_mtp {K} --beta {beta if method == 'MTP-D' else 0}"
                    jobs.append(train_job(args, args.scale, runner.work, f"{text} K{K} {method} seed{seed}", "effect", data, seed, more, text=text, K=K, method=method))
    return jobs


def effect(args, runner, sources):
    runner.all(effect_jobs(args, runner, sources))


def entropy(args, runner, sources):
    runner.all([(f"entropy {text} K4 {method} seed{seed}", "entropy",
                 ["results/entropy.py", str(runner.work / f"{text} K4 {method} seed{seed}".replace(" ", "_")) + "/ckpt.pt", "--json"],
                 dict(seed=seed, text=text, K=4, method=method))
                for text in sources for method in ("MTP", "MTP-D") for seed in SEEDS[args.scale]])


def ablation(args, runner, sources):
    text, (data, extra) = list(sources.items())[-1]
    jobs = []
    for variant, more in ABLATION.items():
        for seed in SEEDS[args.scale][:2]:
            if args.scale == "tiny" and variant not in ("default", "MTP", "paper: KL from step 0", "no detach", "N = 1", "reverse KL"):
                continue
            beta, name = "" if "--beta" in more else "--beta 1", f"ablation {'' if text == 'prose' else text + ' '}{variant} seed{seed}"
            twin = next((r for r in runner.rows if r["name"] == f"{text} K1 {TWINS.get(variant)} seed{seed}"), None)
            if twin and not runner.has(name):                  # the same command has run in the part effect
                runner.add(**{**twin, "name": name, "part": "ablation", "variant": variant})
            jobs.append(train_job(args, args.scale, runner.work, name, "ablation", data, seed, f"{extra} --n_mtp 1 {beta} {more}", text=text, variant=variant))
    runner.all(jobs)


def extend_jobs(args, runner, sources, n, source):
    jobs = []
    for text in sources:
        for method in ("MTP", "MTP-D"):
            for seed in SEEDS[args.scale]:
                base = str(runner.work / f"{text} K4 {method} seed{seed}".replace(" ", "_"))
                jobs.append((f"{text} {n} heads {method} seed{seed}", "extend", ["extend.py", f"{base}{source}/ckpt.pt", "--heads", str(n), "--json", "--out", f"{base}-{n}",
                                                                                 *EXTEND_STEPS[args.scale].split()], dict(seed=seed, text=text, method=method, n=n)))
    return jobs


LOOPS = ((8, ""), (16, "-8"))                  # heads, and what the folder of the model that is extended is called after


def extend(args, runner, sources):
    for n, source in LOOPS:
        runner.all(extend_jobs(args, runner, sources, n, source))


def deep_jobs(args, runner, sources):
    data, extra = sources["python"]
    return [train_job(args, args.scale, runner.work, f"python deep K4 MTP-D seed{seed}", "deep", data, seed, f"{extra} --n_mtp 4 --n_layer 24", text="python", K=4, method="MTP-D")
            for seed in SEEDS[args.scale] if args.scale == "gpu"]


def deep(args, runner, sources):
    runner.all(deep_jobs(args, runner, sources))


def speed(args, runner, sources):
    gpu = args.scale == "gpu"
    options = ["--compile", "kernels", "--tokens", "128", "--prompt_tokens", "64", "--json"] if gpu else ["--tokens", "64", "--prompt_tokens", "32", "--json"]

    def ckpt(name, heads=""):
        return str(runner.work / f"python {name}".replace(" ", "_")) + heads + "/ckpt.pt"

    def job(name, *more, **labels):
        return name, "speed", ["decode.py", *more, *options], dict(text="python", **labels)
    ours = ckpt("K4 MTP-D seed1")
    many = [ckpt("K1 MTP seed1"), ckpt("K4 MTP seed1"), ours, ckpt("K4 MTP-D seed1", "-8"), ckpt("K4 MTP-D seed1", "-16")]
    jobs = [job("speed python", *many, "--bench", "--count", "8"), job("check python", ours, "--check", "--count", "16")]
    if gpu:
        jobs += [job(f"speed python deep seed{seed}", ckpt(f"deep K4 MTP-D seed{seed}"), "--bench", "--count", "16", seed=seed) for seed in SEEDS["gpu"]]
        jobs += [job(f"speed python batch {batch}", ours, "--bench", "--heads", "4", "--batch", str(batch), "--count", str(2 * batch), batch=batch) for batch in (8, 32)]
        jobs += [job("check python deep", ckpt("deep K4 MTP-D seed1"), "--check", "--count", "16")]
    runner.all(jobs, each=1)                   # they are timed


def cost(args, runner, sources):
    import cost as costs
    for part in costs.SCALES[args.scale]:
        runner.run(f"cost {part}", "cost", ["results/cost.py", part, "--json"])


def nanogpt(args, runner, sources):
    if not args.shakespeare:
        return print("nanogpt: give --shakespeare FOLDER (python data/prepare.py shakespeare makes it)")
    runner.all([(f"shakespeare K{K}", "nanogpt", ["train.py", "--preset", "shakespeare", "--data", args.shakespeare, "--n_mtp", str(K), "--compile", "blocks", "--log_every", "100",
                "--out", str(runner.work / f"shakespeare{K}"), "--json"], dict(K=K, seed=1)) for K in (0, 4)])
    for K in (0, 4):
        log = ROOT / runner.work / f"shakespeare{K}" / "log.jsonl"
        if log.exists() and not runner.has(f"shakespeare K{K} curve"):
            vals = [row for row in map(json.loads, open(log, encoding="utf-8")) if "val" in row]
            ms = statistics.median(row["ms"] for row in map(json.loads, open(log, encoding="utf-8")) if "ms" in row)
            runner.add(name=f"shakespeare K{K} curve", part="nanogpt", result=dict(step=[v["step"] for v in vals], val=[round(v["val"]["loss"][0], 4) for v in vals], ms_per_step=round(ms, 2)))


PARTS = {"effect": effect, "entropy": entropy, "ablation": ablation, "extend": extend, "deep": deep, "nanogpt": nanogpt, "speed": speed, "cost": cost}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(MODEL), default="tiny", help="tiny: CPU, one seed; gpu: one CUDA GPU, three seeds")
    parser.add_argument("--part", default="all", help="one of the parts above, several with commas, all, or tables")
    parser.add_argument("--prose", default="", help="a text of prose, or its prepared folder (gpu scale; optional)")
    parser.add_argument("--python", default="python", help="the source-code data: a source of data/prepare.py or a prepared folder")
    parser.add_argument("--shakespeare", default="", help="the prepared Shakespeare folder, for the part nanogpt")
    parser.add_argument("--work", default="out/reproduce", help="folder for checkpoints")
    parser.add_argument("--parallel", type=int, default=0, help="runs side by side on each GPU; 0: 6, or 1 on a CPU (not for speed and cost)")
    args = parser.parse_args()
    unknown = set(args.part.split(",")) - set(PARTS) - {"all", "tables"}
    if unknown:
        sys.exit(f"unknown part {', '.join(unknown)}; choose from {', '.join(PARTS)}, all, tables")
    if args.parallel < 0:
        sys.exit(f"--parallel is {args.parallel}; it must be 0 or more")
    sources = {"python": (args.python, "--tokenizer bpe:4096 --dropout 0.1" if args.scale == "gpu" else "")}
    if args.prose and args.scale == "gpu":
        sources["prose"] = (args.prose, "--tokenizer bpe:4096")
    runner = Runner(args.scale, args.work, args.parallel or (6 if args.scale == "gpu" else 1))
    makers = effect_jobs(args, runner, sources) + deep_jobs(args, runner, sources) + [job for loop in LOOPS for job in extend_jobs(args, runner, sources, *loop)]
    runner.makers = {Path(job[2][job[2].index("--out") + 1]): job for job in makers}
    for name, part in PARTS.items():
        if args.part == "all" or name in args.part.split(","):
            print(f"== {name}", flush=True)
            part(args, runner, sources)
    tables.write(runner.folder, runner.rows)
    if runner.failed:
        sys.exit(f"{runner.failed} runs failed; call it again to run only those")


if __name__ == "__main__":
    main()
