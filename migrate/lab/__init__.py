"""Several hosts on one machine, to try cmigrate out and to test it: each has network, mounts and a name of its own."""
