"""launch/queued_resource.sh: what it does with a TPU that comes late, fails, is preempted or cannot be deleted."""

import signal
import subprocess

import pytest
from launch_desk import Desk
from launch_machine import end, wait_for

# A stand-in for gcloud with a memory: `on VERB` is "0" the first time it is asked to VERB, then "1" and so on.
REMEMBERING = """
count() { local n; n=$(cat "$CALLS.$1" 2>/dev/null || echo 0); echo $((n + 1)) > "$CALLS.$1"; echo "$n"; }
verb="$4"; n=$(count "$verb"); case "$verb $n" in
"""


def gcloud(*answers: str) -> str:
    """A gcloud that finds the TPU active and all well, but for what `answers`, cases of "VERB N", say."""
    return REMEMBERING + "\n".join(f"{answer} ;;" for answer in answers) + "\n describe\\ *) echo ACTIVE ;; esac"


class TestQueuedResource:
    """Whatever happens, a TPU that was made is deleted."""

    def launch(self, machine: Desk, *answers: str) -> subprocess.CompletedProcess[str]:
        return machine.launch("queued_resource.sh", DO_gcloud=gcloud(*answers))

    def test_waits_until_it_is_there(self, machine):
        done = self.launch(machine, '"describe 0") echo WAITING_FOR_RESOURCES', '"describe 1") echo PROVISIONING')
        assert done.returncode == 0, done.stderr
        assert machine.verbs == ["create", "describe", "describe", "describe", "ssh", "delete"]

    def test_one_that_cannot_be_made_is_not_deleted(self, machine):
        assert self.launch(machine, '"create 0") exit 9').returncode == 9  # it may be another's, of the same name
        assert machine.verbs == ["create"]

    @pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
    def test_a_request_that_fails(self, machine, state):
        done = self.launch(machine, f'"describe 0") echo {state}')
        assert (done.returncode, done.stderr) == (1, f"The request for a-name is {state}; the console says why.\n")
        assert machine.verbs == ["create", "describe", "delete"]

    def test_a_failure_to_ask_is_forgiven(self, machine):
        assert self.launch(machine, '"describe "[0123]) exit 1').returncode == 0
        assert machine.verbs[-2:] == ["ssh", "delete"]

    def test_five_failures_to_ask_are_not(self, machine):
        assert self.launch(machine, '"describe "*) exit 1').returncode == 1
        assert machine.verbs == ["create", *["describe"] * 5, "delete"]

    @pytest.mark.parametrize("status", [2, 7])
    def test_a_training_that_fails(self, machine, status):
        assert self.launch(machine, f'"ssh 0") exit {status}').returncode == status
        assert machine.verbs == ["create", "describe", "ssh", "describe", "delete"]

    @pytest.mark.parametrize("status", [255, 143, 1])
    def test_a_preempted_one_is_queued_for_again(self, machine, status):
        done = self.launch(machine, f'"ssh 0") exit {status}', '"describe 1") echo SUSPENDING')
        assert done.returncode == 0, done.stderr
        assert done.stdout == "a-name is SUSPENDING: queueing again.\n"
        attempt = ["create", "describe", "ssh"]
        assert machine.verbs == [*attempt, "describe", "delete", *attempt, "delete"]
        assert machine.calls[0] == machine.calls[5]

    def test_one_that_cannot_be_had_again(self, machine):
        done = self.launch(machine, '"ssh 0") exit 255', '"describe 1") echo SUSPENDED', '"create 1") exit 9')
        assert done.returncode == 9
        assert machine.verbs[-2:] == ["delete", "create"]

    def test_a_lost_connection_is_made_again(self, machine):
        assert self.launch(machine, '"ssh "[01]) exit 255').returncode == 0
        assert machine.verbs == ["create", *["describe", "ssh"] * 3, "delete"]

    def test_one_that_is_never_reached_is_given_up(self, machine):
        done = self.launch(machine, '"ssh "*) exit 255')
        assert done.returncode == 1 and "ten times" in done.stderr
        assert machine.verbs.count("ssh") == 10 and machine.verbs[-1] == "delete"

    def test_one_that_cannot_be_deleted_is_reported(self, machine):
        done = self.launch(machine, '"delete 0") exit 9')
        assert done.returncode == 1 and "a-name could not be deleted" in done.stderr

    @pytest.mark.parametrize(("sent", "status"), [("TERM", 143), ("INT", 130), ("HUP", 143)])
    def test_an_interruption(self, machine, sent, status):
        answer = f'"ssh 0") echo > "{machine.folder}/started"; exec /bin/sleep 600'
        process = machine.start(
            "queued_resource.sh", *machine.arguments("queued_resource.sh"), DO_gcloud=gcloud(answer)
        )
        wait_for(machine.folder / "started", process)
        process.send_signal(getattr(signal, f"SIG{sent}"))
        end(process)
        assert process.returncode == status
        assert machine.verbs == ["create", "describe", "ssh", "delete"]
