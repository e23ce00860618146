"""jdm plan"""

import argparse
import json
import os

from jdm import startup
from jdm.analysis.plan_options import CHIPS
from jdm.cli.shared import add_config, check_parent
from jdm.config import load_config
from jdm.errors import NO_VALUE, InvalidValue
from jdm.files import write_whole
from jdm.messages import STDOUT, say
from jdm.names import did_you_mean
from jdm.options import POSITIVE, WHOLE, Option

HELP = "Compile a config for TPU slices that are not here: does it fit, how fast could it be?"
EXAMPLE = "jdm plan --config=reference/cifar10 --topology=v5e:2x2,v5e:4x4 --per_chip=128"

PER_CHIP = Option(None, "images of each chip in a step", POSITIVE, kind=WHOLE)
# libtpu looks for chips of this machine, in a service of Google Cloud and in a lock file.
NO_CHIPS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def add_flags(command: argparse.ArgumentParser) -> None:
    add_config(command, required=False)
    add = command.add_argument
    text = f"slices with commas between, such as v5e:4x4, of {', '.join(CHIPS)}; list: common ones"
    add("--topology", required=True, help=text)
    text = f"{PER_CHIP.help} (config.data.batch_size divided by the chips)"
    add("--per_chip", help=text)
    add("--out", help="a .json for the figures, the largest buffers too")


def run(arguments: argparse.Namespace) -> None:
    if arguments.topology == "list":
        for name, chip in CHIPS.items():
            rate, memory = f"{chip.flops / 1e12:.0f} TFLOP/s", f"{chip.memory / 2**30:.0f} GiB"
            slices = " ".join(f"{name}:{shape}" for shape in chip.slices.split())
            print(f"{name}  {rate}, {memory}, {chip.bandwidth / 1e9:.0f} GB/s: {slices}")
        return
    topologies = arguments.topology.split(",")
    for topology in topologies:
        kind, colon, shape = topology.partition(":")
        if kind not in CHIPS or not colon or not shape or len(set(topologies)) < len(topologies):
            known = f"must be different slices of {', '.join(CHIPS)}, such as v5e:4x4"
            raise InvalidValue("topology", topology, known, did_you_mean(kind, CHIPS))
    if arguments.config is None:
        raise InvalidValue("config", NO_VALUE, "is needed, but for --topology=list")
    text = arguments.per_chip
    per_chip = None if text is None else PER_CHIP.read("per_chip", text)
    if per_chip is not None:
        PER_CHIP.check("per_chip", per_chip)
    config = load_config(arguments.config, arguments.overrides)
    out = arguments.out and check_parent("out", arguments.out)
    if out and out.suffix != ".json":
        raise InvalidValue("out", arguments.out, "must end in .json")
    os.environ.update(NO_CHIPS)  # before JAX and libtpu are imported
    if os.environ.pop("XLA_FLAGS", ""):  # libtpu aborts the process at flags of another platform
        say("$XLA_FLAGS is not used: it is for the devices of this machine")
    startup.set_up()
    from jdm.analysis.plan import plans, report, rows_of
    from jdm.analysis.report import table

    found = report(config, plans(config, topologies, per_chip))
    for name in next(iter(found.values())):
        print("\n".join([name, "", *table(rows_of(name, found))]))
    say("bounds from XLA's counts, not times that were measured", STDOUT)
    if out:
        write_whole(out, json.dumps(found, indent=1) + "\n")
        say(f"wrote {out}", STDOUT)
