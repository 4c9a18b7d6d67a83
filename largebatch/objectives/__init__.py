"""What is optimized: a file for each objective, by the name of `objective.name`.

Such a file has a function `build(config: TrainConfig) -> Objective`.
"""
