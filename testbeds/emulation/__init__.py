"""What makes processes of this machine behave like the devices of a testbed: namespaces, links and limits."""
