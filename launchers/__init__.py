"""Where runs execute: Hydra launchers. Their import name is `hydra_plugins.soup_launchers` everywhere."""
