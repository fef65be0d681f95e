"""Parameter groups and learning-rate schedules; the engine owns the optimizer's partitioning and
precision.
"""
