"""`python -m pqlab run`: the report's pipeline on one model and text, stage by stage.

`command` reads what was typed, `settings` checks it, `job` holds what the stages share, `stages` says what each stage
needs, `runner` runs them and goes on where an interrupted run stopped. The stages themselves are a file each.
"""
