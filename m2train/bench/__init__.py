"""m2bench: correctness, then time, then a row that says on what machine and how sure.

case.py       what an op's benchmark file states: inputs, oracle, implementations, bytes and FLOPs
shapes.py     shapes of real models and of RL batches; recorder.py makes workloads of a run's rollouts
peers.py      other projects' kernels behind one interface; a missing one is a reason
registry.py   finds the case files and selects rows
launch.py     one launch of an implementation; rotation of inputs out of the caches
check.py      numerics and cheats: what fails is never timed
timers.py     cpu, wall, callgrind; CUDA events, graphs, kernel time
worker.py     one measuring process; pool.py starts it, host.py boots it, also on another build's modules
runner.py     several workers, interleaved rounds, rows
stats.py      bootstrap, t intervals, verdicts
ceilings.py   what the machine can do at best; env.py what the machine is
compare.py    A against B: two builds (build.py) or two row files
schema.py     the row; rows.py reads and writes it
report/       Markdown, HTML, CSV and the README's table from rows
faults.py     planted slowdown and cheats, which selftest.py must catch
"""
