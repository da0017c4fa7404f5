"""Where the plugin meets arcface_torch: the entry points, and the patches that open the host for them."""
