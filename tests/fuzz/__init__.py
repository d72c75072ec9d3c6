"""Fuzzing: state machines of training runs, and targets for atheris; `make fuzz` runs them long."""
