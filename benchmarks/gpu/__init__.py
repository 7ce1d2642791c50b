"""Everything that only a GPU can show, measured by one command for whoever has one for minutes.

    python -m benchmarks.gpu --minutes 4 --out results
        the most valuable measurements that fit into four minutes; the same command again takes up
        those that are missing
    python -m benchmarks.gpu --trial --out trial
        all of them on tiny models, on a CPU too: tries the program, measures nothing

`plan` lists the measurements; `runner` gives each a time box, in a process of its own that may
fail; `results` keeps what they found. A measurement is a function of a `Bench`.
"""
