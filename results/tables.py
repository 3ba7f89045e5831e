"""tables.md and the figures, from runs.jsonl"""


def write(folder, rows):
    pass
