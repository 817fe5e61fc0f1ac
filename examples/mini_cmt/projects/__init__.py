"""The plugin folder, a package: torch.compile cannot name the file of a namespace package."""
