"""
check.py: does this build still learn what was recorded? Called by reproduce.py:

    python results/reproduce.py --check            as `python train.py` on a CPU, in the README
    python results/reproduce.py --check --quick    smaller and shorter: under a minute on 2 cores
    python results/reproduce.py --check --beta 0   other flags go to train.py; this must be outside
    python results/reproduce.py --check --record 1,2,3,4,5,6,7,8      write the record

A record (tiny/check.json, tiny/check-quick.json) holds the results of several seeds. The check
trains once more, with a seed that is not among them, and compares every measure of the evaluation.

What is allowed: the range of the recorded runs, widened at both ends by SPREAD of their standard
deviations. If a measure is normally distributed over seeds, a new seed has it outside that in 0.3 %
of all cases with 9 recorded runs (1.1 % with 6; simulated). Other processors and libraries round
differently, and training amplifies the last bit until the same seed differs about as much as
another one does. So --quick --record adds one more run: the first seed again, in one thread and
without the processor's vector instructions (OTHER_CPU), which takes several times as long.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import UserError  # noqa: E402

SPREAD = 3
TINY = ["--preset", "tiny", "--device", "cpu"]
# a smaller model: in a minute tiny itself takes 120 steps, after which --beta 0 is still within the
# spread of the seeds
QUICK = ["--n_layer", "3", "--n_mtp", "2", "--steps", "300"]
OTHER_CPU = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
             "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}


def record_path(quick):
    return ROOT / "results" / "tiny" / ("check-quick.json" if quick else "check.json")


def processor():
    """the name of the CPU"""
    info = Path("/proc/cpuinfo")                       # Linux; elsewhere Python knows it
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def versions(header):
    """the header of a log -> what ran there: texts"""
    return dict(
        device=f"{processor()}, {os.cpu_count()} cores", torch=f"torch {header['torch']}",
        python=f"Python {platform.python_version()}", commit=f"commit {str(header['commit'])[:9]}",
    )


# -----------------------------------------------------------------------------
# one run


def train(seed, flags, work, environment=None):
    """train.py in a process of its own, its bar on the screen -> (its results, its log's header)"""
    out = Path(work) / "check"
    command = ["train.py", *flags, "--seed", str(seed), "--out", str(out), "--json"]
    done = subprocess.run(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, encoding="utf-8", cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", **(environment or {})},
    )
    if done.returncode:
        raise UserError("train.py stopped, its message stands above; nothing was compared")
    with open(ROOT / out / "log.jsonl", encoding="utf-8") as log:
        header = json.loads(log.readline())
    return json.loads(done.stdout.splitlines()[-1]), header


def measures(result):
    """an evaluation of train.py -> {name: number}, all that is compared"""
    named = {}
    for key, first in (("loss", 0), ("kl", 1), ("ar", 1), ("car", 1)):
        name = "loss" if key == "loss" else key.upper()
        for head, value in enumerate(result[key], first):
            named[f"{name} {head or 'main'}"] = value
    named["tokens per forward"] = result["tokens_per_forward"]
    return named


# -----------------------------------------------------------------------------
# the comparison


def limits(values):
    """recorded values -> the smallest and the largest allowed value"""
    margin = SPREAD * statistics.stdev(values)
    return min(values) - margin, max(values) + margin


def compare(record, found):
    """
    a record and {name: number} -> rows (dicts): name, found, mean, low, high (of the record),
    allowed (low, high), outside: by how much, with its sign; 0 where it is inside
    """
    if record["values"].keys() != found.keys():
        raise UserError(f"this run has {', '.join(found)}; the record has "
                        f"{', '.join(record['values'])}: leave out the flags that change what is "
                        "measured, such as --n_mtp")
    rows = []
    for name, values in record["values"].items():
        low, high = limits(values)
        x = found[name]
        outside = 0.0
        if not low <= x <= high:
            outside = x - (low if x < low else high)
        rows.append(dict(
            name=name, found=x, mean=statistics.mean(values), low=min(values), high=max(values),
            allowed=(low, high), outside=outside,
        ))
    return rows


def table(rows):
    lines = [f"{'measure':18} {'this run':>9} {'mean':>9}  {'range of the record':^20} "
             f"{'allowed':^20}"]
    for row in rows:
        low, high = row["allowed"]
        verdict = "inside"
        if row["outside"]:
            verdict = f"OUTSIDE by {row['outside']:+.4f}"
        lines.append(
            f"{row['name']:18} {row['found']:9.4f} {row['mean']:9.4f}  {row['low']:9.4f} to "
            f"{row['high']:<7.4f} {low:9.4f} to {high:<7.4f} {verdict}"
        )
    return "\n".join(lines)


def read_record(path):
    if not path.exists():
        raise UserError(f"there is no record {path}; make one with --record 1,2,3,4,5,6,7,8")
    return json.loads(path.read_text(encoding="utf-8"))


def compare_new_run(more, quick, seed, work):
    """train with a new seed, print the comparison -> how many measures are outside"""
    record = read_record(record_path(quick))
    seed = seed or max(record["seeds"]) + 1
    if seed in record["seeds"]:
        raise UserError(f"--seed {seed} is one of the record's ({record['seeds']}); choose another")
    flags = [*record["flags"], *more]
    print(f"python train.py {' '.join(flags)} --seed {seed}\n(the record's runs took "
          f"{record['seconds']:.0f} s each on {record['device']})", flush=True)
    begin = time.time()
    result, header = train(seed, flags, work)
    rows = compare(record, measures(result))
    here = versions(header)
    print(f"\nthis run: {time.time() - begin:.0f} s, {', '.join(here.values())}")
    print(f"record:   seeds {record['seeds']}, {', '.join(record[name] for name in here)}")
    print(f"\n{table(rows)}\n")
    outside = sum(row["outside"] != 0 for row in rows)
    print(f"{len(rows) - outside} of {len(rows)} measures are inside (allowed: the record's range "
          f"and {SPREAD} of its standard deviations more, at both ends)")
    if header["data_sha256"] != record["data_sha256"]:
        outside += 1
        print(f"OUTSIDE: the text is another one (sha256 {header['data_sha256'][:12]}; record: "
              f"{record['data_sha256'][:12]})")
    return outside


# -----------------------------------------------------------------------------
# the record


def parse_seeds(name, text, at_least):
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if len(set(seeds)) < max(at_least, len(seeds)):
        raise UserError(f"--{name} is {text!r}; it must be different seeds, with commas, at least "
                        f"{at_least}")
    return seeds


def make_record(more, quick, seeds, work):
    """train with every seed (quick: with the first one once more, as on another CPU); write the
    record"""
    flags = [*TINY, *(QUICK if quick else []), *more]
    values = {}
    seconds = []
    runs = [(seed, {}) for seed in seeds]
    last = "the values are those of the seeds"
    if quick:
        runs.append((seeds[0], OTHER_CPU))
        last = f"the last of the values: seed {seeds[0]} with {OTHER_CPU}"
    for seed, environment in runs:
        begin = time.time()
        result, header = train(seed, flags, work, environment)
        seconds.append(time.time() - begin)
        print(f"seed {seed} {environment or ''}, {seconds[-1]:.0f} s: {result}", flush=True)
        for name, value in measures(result).items():
            values.setdefault(name, []).append(round(value, 6))
    record = dict(
        command=f"python train.py {' '.join(flags)} --seed SEED", flags=flags, seeds=seeds,
        last=last, **versions(header),
        data_sha256=header["data_sha256"],
        seconds=round(statistics.mean(seconds[: len(seeds)]), 1), values=values,
    )
    write_record(record_path(quick), record)
    print_left_out(record)


def write_record(path, record):
    """an entry per line, a measure per line"""
    lines = []
    for name, value in record.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            inner = [f"  {json.dumps(key)}: {json.dumps(x)}" for key, x in value.items()]
            text = "{\n" + ",\n".join(inner) + "\n }"
        lines.append(f" {json.dumps(name)}: {text}")
    part = path.with_name(path.name + ".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(part, path)
    print(f"wrote {path}")


def print_left_out(record):
    """would each run be inside the record of the others? Each should"""
    seeds = [*record["seeds"], record["seeds"][0]]
    for i, _ in enumerate(record["values"]["loss main"]):
        others = {name: values[:i] + values[i + 1 :] for name, values in record["values"].items()}
        found = {name: values[i] for name, values in record["values"].items()}
        rows = compare({**record, "values": others}, found)
        names = [row["name"] for row in rows if row["outside"]]
        print(f"seed {seeds[i]} against the others: {len(names)} of {len(rows)} outside {names}")
