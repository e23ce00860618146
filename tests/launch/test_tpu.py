"""launch/tpu.sh and launch/xpk.sh against a stand-in for Google Cloud.

Its queued resource is the file `state`; each of its two workers has a home folder, in which the
commands that come over ssh are really run, with stand-ins for what needs root or a network.
"""

import re
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent.parent / "launch"
RUN = [
    *("--project=p", "--zone=us-west4-a", "--slice=v5litepod-8", "--spot", "--store=gs://b"),
    *("--package=jdm==1", "--config=tiny", "--workdir=run"),
]

# "fails" holds patterns of commands that fail once; "next" the states that follow one another.
GCLOUD = r"""
while read -r once; do
  if [[ -n $once && $* == *$once* ]]; then
    grep -vxF -- "$once" "$HERE/fails" >"$HERE/fails.new"
    mv "$HERE/fails.new" "$HERE/fails"
    touch "$HERE/enough"
    echo "ERROR: gcloud is out of order" >&2
    exit 1
  fi
done <"$HERE/fails"
active() { [[ $(cat "$HERE/state" 2>/dev/null) == ACTIVE ]]; }
case "$*" in
storage*) cat "$HERE/hns" ;;
*' create '*)
  [[ ! -e $HERE/state ]] || { echo "ERROR: ALREADY_EXISTS" >&2 && exit 1; }
  printf '%s\n' WAITING_FOR_RESOURCES PROVISIONING ACTIVE >"$HERE/next"
  echo CREATING >"$HERE/state"
  rm -rf "$HERE"/worker-*
  mkdir "$HERE/worker-0" "$HERE/worker-1"
  ;;
*' describe '*)
  [[ -e $HERE/state ]] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2 && exit 1; }
  echo "WARNING: a newer gcloud is there" >&2
  cat "$HERE/state"
  if [[ -s $HERE/next ]]; then
    head -1 "$HERE/next" >"$HERE/state"
    sed -i 1d "$HERE/next"
  fi
  ;;
*' delete '*) rm "$HERE/state" ;;
*' scp '*)
  active || exit 1
  for home in "$HERE"/worker-*; do cp "$5" "$home"; done
  ;;
*' ssh '*)
  active || exit 1
  [[ $* =~ --worker=([^ ]+) ]] && workers=${BASH_REMATCH[1]}
  for word; do [[ $word != --command=* ]] || command=${word#--command=}; done
  command=${command//\/mnt\/jdm/$HERE\/mnt}
  if [[ -e $HERE/preempt && $command == *follow* ]]; then
    rm "$HERE/preempt"
    for home in "$HERE"/worker-*; do
      until grep -q ^worker "$home/jdm-run/log"; do sleep 0.05; done
      kill -KILL -- "-$(<"$home/jdm-run/pid")"
    done
    echo SUSPENDING >"$HERE/state"
    echo SUSPENDED >"$HERE/next"
    echo "ssh: connection reset" >&2
    exit 255
  fi
  status=0
  for home in "$HERE"/worker-${workers/all/*}; do
    (cd "$home" && HOME=$home WORKER=${home##*-} bash -c "$command") || status=$?
  done
  exit $status
  ;;
esac
"""
# Each start of the training takes the next line of the plan of its worker: "STATUS", or "wait".
JDM = r"""
[[ $1 == train ]] || { echo "jdm 1" && exit; }
plan=$HERE/plan-$WORKER
read -r what <"$plan"
sed -i 1d "$plan"
echo "worker $WORKER: $what"
[[ $what != wait ]] || exec sleep 60
exit "$what"
"""


@pytest.fixture
def cloud(machine):
    """plan: of the statuses of the trainings, on both workers or on each."""
    machine.has("gcloud", GCLOUD)
    machine.has("jdm", JDM)
    machine.has("mountpoint", "exit 1")
    for name in ("sudo", "gcsfuse", "uv"):
        machine.has(name)
    for name, text in (("fails", ""), ("hns", "True\n")):
        (machine.folder / name).write_text(text)

    def plan(*statuses, other=None):
        for i, each in enumerate((statuses, other or statuses)):
            (machine.folder / f"plan-{i}").write_text("".join(f"{one}\n" for one in each))

    machine.plan = plan
    return machine


def verbs(cloud) -> list[str]:
    """The calls of gcloud in short: "create", "ssh all install"; one of several equal ones."""
    found: list[str] = []
    for call in cloud.called("gcloud compute"):
        verb = re.search(r"(?:queued-resources|tpu-vm) (\w+)", call)[1]
        if verb == "ssh":
            verb += " " + " ".join(re.search(r"--worker=(\S+).*worker\.sh (\w+)", call).groups())
        if verb != (found or [""])[-1]:
            found.append(verb)
    return found


START = ["scp", "ssh all mount", "ssh all install", "ssh all start"]
END = ["ssh 0 follow", "describe", "ssh all status"]
BEGIN = ["describe", "ssh all status"]


def test_from_nothing_to_a_complete_training(cloud):
    cloud.plan(0)
    done = cloud.run(LAUNCH / "tpu.sh", *RUN, "--", "--config.seed=3")
    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["describe", "create", *BEGIN, *START, *END, "delete"]
    assert "worker 0: 0" in done.stdout and "the training is complete" in done.stderr
    for state in ("not there", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert f"jdm: {state}\n" in done.stderr
    assert not (cloud.folder / "state").exists()
    created = cloud.called("gcloud compute tpus queued-resources create jdm --project=p")
    assert (
        "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite --spot" in created[0]
    )
    trained = cloud.called("jdm train")
    assert len(trained) == 2 and all("--distributed --config.seed=3" in line for line in trained)
    mounted = cloud.called("gcsfuse")
    assert len(mounted) == 2 and all("--enable-streaming-writes=false b" in one for one in mounted)
    assert all("jdm==1 jax[tpu]" in one for one in cloud.called("uv pip install"))
    assert (cloud.folder / "mnt" / "run").is_dir()


def test_it_recovers_from_errors_of_the_cloud_and_from_a_preemption(cloud):
    cloud.plan("wait", 143, 0, other=("wait", 1, 0))
    (cloud.folder / "preempt").touch()
    (cloud.folder / "fails").write_text("describe jdm\ncreate jdm\nworker.sh install\n")
    done = cloud.run(LAUNCH / "tpu.sh", *RUN)
    assert done.returncode == 0, done.stderr
    again = ["ssh all mount", "ssh all install", "ssh all start"]
    expected = [
        *("describe", "create", "describe", "create"),  # of which the first has failed
        *(*BEGIN, *START[:3], *BEGIN, "scp", *again, "ssh 0 follow"),
        *("describe", "delete", "describe", "create"),  # SUSPENDED
        *(*BEGIN, *START, *END),  # the training ends with 143, and is started again
        *(*START, *END, "delete"),
    ]
    assert verbs(cloud) == expected
    assert "jdm: SUSPENDED" in done.stderr and "it is started again, 9 more" in done.stderr
    assert len(cloud.called("jdm train")) == 6
    assert not (cloud.folder / "state").exists()


def test_a_training_that_runs_is_followed_by_the_same_command(cloud):
    cloud.plan(0, "wait")
    assert cloud.run(LAUNCH / "tpu.sh", *RUN, "--delete=never").returncode == 0
    cloud.calls.unlink()
    # As if started by a command that has been interrupted; it ends when the connection is lost.
    work = "bash worker.sh start jdm-run 0 bash -c 'until [[ -e ../enough ]]; do sleep 0.05; done'"
    for i in range(2):
        home = cloud.folder / f"worker-{i}"
        assert cloud.run("-c", f"cd {home} && HOME={home} && {work}").returncode == 0
    (cloud.folder / "fails").write_text("worker.sh follow\n")
    done = cloud.run(LAUNCH / "tpu.sh", *RUN)
    assert done.returncode == 0, done.stderr
    assert not {"create", "scp"} & set(verbs(cloud)) and cloud.called("jdm train") == []


def test_input_that_is_refused_ends_it_and_the_machines_stand(cloud):
    cloud.plan(1, other=[2])
    done = cloud.run(LAUNCH / "tpu.sh", *RUN)
    assert done.returncode == 2 and "delete" not in verbs(cloud)
    last = done.stderr.splitlines()[-1]
    command = last.partition("to delete it: ")[2]
    assert "jdm stands, and costs money" in last
    assert cloud.run(*command.split()).returncode == 0
    assert verbs(cloud)[-1] == "delete" and not (cloud.folder / "state").exists()


@pytest.mark.parametrize("when", ["done", "ended", "never"])
def test_a_training_that_fails_again_and_again_ends(cloud, when):
    cloud.plan(1, 1, 1, 0)
    done = cloud.run(LAUNCH / "tpu.sh", *RUN, "--restarts=2", f"--delete={when}")
    assert done.returncode == 1 and "is not started again" in done.stderr
    assert len(cloud.called("jdm train")) == 6
    assert (verbs(cloud)[-1] == "delete") == (when == "ended")
    assert ("costs money" in done.stderr) == (when != "ended")


def test_a_cloud_that_stays_out_of_order_ends_it(cloud):
    cloud.has(
        "gcloud", '[[ $1 != storage ]] || { echo True && exit; }; echo "ERROR: no" >&2; exit 1'
    )
    done = cloud.run(LAUNCH / "tpu.sh", *RUN)
    assert done.returncode == 1 and "(failure 10 of 10)" in done.stderr
    assert "may still stand" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("says", ["", "False\n"])
def test_a_bucket_that_cannot_rename_folders_is_refused(cloud, says):
    (cloud.folder / "hns").write_text(says)
    done = cloud.run(LAUNCH / "tpu.sh", *RUN)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--store='gs://b' must be a bucket with hierarchical namespace" in done.stderr
    assert verbs(cloud) == []


def test_a_bucket_that_cannot_be_read_is_refused(cloud):
    (cloud.folder / "fails").write_text("storage\n")
    done = cloud.run(LAUNCH / "tpu.sh", *RUN)
    assert done.returncode == 2 and "--store='gs://b' cannot be read" in done.stderr
    assert verbs(cloud) == []


XPK = [
    *("--project=p", "--zone=us-west4-a", "--cluster=c", "--slice=v5litepod-8", "--image=i"),
    *("--config=tiny", "--workdir=/mnt/jdm/run"),
]


@pytest.mark.parametrize("there", [True, False])
def test_a_workload_is_created_once(machine, there):
    rows = "jdm   2026-01-01" if there else "jdm-other   2026-01-01"
    machine.has("xpk", f'[[ $* != *filter* ]] || echo "{rows}"; [[ $* != *wait* ]] || exit 125')
    done = machine.run(LAUNCH / "xpk.sh", *XPK, "--", "--config.seed=3")
    assert done.returncode == 125  # that of xpk, for a workload that has failed
    created = machine.called("xpk workload create")
    assert len(created) == (not there)
    assert all("--workdir=/mnt/jdm/run --distributed --config.seed=3" in one for one in created)


def test_a_cluster_that_cannot_be_read_is_refused(machine):
    machine.has("xpk", "echo no such cluster; exit 1")
    done = machine.run(LAUNCH / "xpk.sh", *XPK)
    assert done.returncode == 2 and "--cluster='c' cannot be read: no such cluster" in done.stderr
    assert machine.called("xpk workload create") == []
