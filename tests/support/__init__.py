"""What integration tests share: two hosts on this machine, clients of the services that run on them."""
