"""What tests share: waiting, running commands, namespaces, the installation under test, programs in C."""
