"""From a message to an outcome in the database, room by room:

1. `consumer` receives: a message is a hint that a job may be claimed, and nothing more; it waits in
   the `inbox`;
2. `claiming` claims those that can start soon, in one transaction, under a new lease token, hands
   them to the pool, and acknowledges what could not be claimed (it runs, has ended, waits again);
3. the pool runs them, while `lease` renews what is in the table of `attempts`;
4. `recording` makes events of what they tell, in batches, and gives each the one transition that
   its ending leads to, by its token, many in one transaction;
5. it acknowledges after the commit. What is lost before it comes again and is dropped in 2.

`worker` builds the rooms and starts them; each has the threads that it says it has.
"""
