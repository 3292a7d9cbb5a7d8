"""This service measured beside others that run jobs, and beside a bare gRPC echo.

`sides` and `peers` start each of them on private `nodes`, `clients` make the calls from processes
of their own as `orders` tells them, `sections` and `stories` say what is measured, `report` and
`plots` what is shown of the `results`. Everything runs on one machine and shares its cores, so what
matters is how the sides compare within one run, and what CPU time a job takes of each process;
rounds are repeated so that noise shows.

What makes it a fair race: the same job (it answers with its payload), the same database with fsync,
the same broker where there is one, two worker processes where one cannot use two cores; ended jobs
are kept, and so are results where the system can. A submit counts once it is answered: here that
means committed to the database. Celery by default does not wait for its broker at all, so it is
measured both with publisher confirms (the nearest that it has) and without.
"""
