"""``python -m deepspec VERB ...``: the program ``deepspec``, also for launchers (``deepspeed --module deepspec``)."""

from deepspec.cli import run

if __name__ == "__main__":
    run()
