"""The subcommands of `hmar-jax`, one thin module each."""
