"""What assembles the parts: settings, registry, Serve application, the baton command."""
