"""What the gRPC door costs when it is abused.

`victim` is a server of its own (`jobsvc dev` on loopback, with tokens), `attacker` a process that
does one of the `attacks` over `wire`, which is HTTP/2 without the manners of a client library. What
is told of each: the server's memory at its peak, when the attack had lasted, and after it; how long
an ordinary caller beside it waited; and what became of the attacker's calls. All is bounded: in
calls, in bytes, in time.
"""
