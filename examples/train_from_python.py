"""``holdfast.train`` from a script or a notebook: the words of the command line go in, what the run has left comes out.

    python examples/train_from_python.py RUNS

A small model on Python's own source, in forked processes; one of them is killed on purpose.
"""

import sys

import holdfast

result = holdfast.train(
    ["experiment=demo", "trainer.max_steps=16", 'chaos.faults=["sigkill rank=1 step=8"]', f'root="{sys.argv[1]}"']
)

print(result)  # how it ended and where it is
print(f"loss: {result.metrics[0]['loss']:.3f} after one step, {result.metrics[-1]['loss']:.3f} after {result.step}")
for event in result.events:
    if event["event"] == "recovery_done":
        print(f"recovered in {event['repaired_in_s']:.1f} s, {event['steps_lost']} steps lost")
print(f"checkpoint: {result.checkpoint}")
print(f"weights: {result.weights}")
