"""The commands of `icl-moe`: the options of each, and what it runs. What a command needs is loaded
when it runs, so that `icl-moe --help` answers at once.
"""
