/*
 * The life of one outbox row, with all actors that touch it and all faults.
 *
 * Postgres is the truth: each transaction is one step, except the relay's, which holds the row's lock while it talks to
 * Redis. Redis is disposable: it forgets, repeats and invents jobs. Time is only an order: a step that comes "late
 * enough" in production may come at any moment here, unless a guard names what it waits for.
 *
 * README.md lists what is left out and why, the statement of each step, and how to read a counterexample.
 *
 * Macros that select what is checked:
 *   RETRIES    max_retries of the row
 *   FAULTS     upper bound of faults in one run
 *   REVIVALS   how many times an operator retries the row when it is dead
 *   CHAOS      faults without limit, but at most CHAOS hand-overs; for safety properties only
 * Each other macro removes one part of the design, so that a property must fail: see the mutations in README.md.
 */

#ifndef RETRIES
#define RETRIES 1
#endif
#ifndef FAULTS
#define FAULTS 2
#endif
#ifndef REVIVALS
#define REVIVALS 0
#endif

/*
 * "Eventually" means: after the last fault. No design can finish a row while Redis keeps forgetting every job or
 * workers keep crashing, and a checker would report just that. A budget that a run may spend at any moment, on any kind
 * of fault, or not at all, stands for "finitely many faults", up to its size.
 */
#ifdef CHAOS
#define MAY_FAIL true
#define FAIL skip
#define MAX_DELIVERY CHAOS
#else
byte faults = FAULTS;
#define MAY_FAIL (faults > 0)
#define FAIL faults--
#define MAX_DELIVERY (HANDOVERS + 1)  /* one too many, so that `bounded` can fail */
#endif

/* Each hand-over after the first follows a failed attempt or a fault. */
#define HANDOVERS ((1 + RETRIES) * (1 + REVIVALS) + FAULTS)

/* Postgres: the row, and the relay that holds its lock across steps (0: none). */
mtype = { absent, pending, enqueued, running, done, dead };
mtype status = absent;
byte delivery;
byte attempts;
bool due;       /* run_at has passed; only read while the row is pending or enqueued */
bool lease;     /* lease_until has not passed; false if there is no lease */
byte lock;

/*
 * Redis: the number of jobs of each delivery, in the queue or in rq-scheduler's set. A worker gets a job from the set
 * once the row is due. Two copies behave like any larger number. One delivery is beyond the row's last, so that a
 * foreign client can name it. Under CHAOS Redis has no memory: its answers are arbitrary.
 */
#define COPIES 2
#ifdef CHAOS
#define HAS_JOB(d) (d <= MAX_DELIVERY + 1)
#define HAS_NO_JOB(d) true
#define HAS_ROOM(d) true
#define PUT_JOB(d) skip
#define TAKE_JOB(d) skip
#else
byte jobs[8];
#define HAS_JOB(d) (jobs[d] > 0)
#define HAS_NO_JOB(d) (jobs[d] == 0)
#define HAS_ROOM(d) (d <= MAX_DELIVERY + 1 && jobs[d] < COPIES)
#define PUT_JOB(d) jobs[d]++
#define TAKE_JOB(d) jobs[d]--
#endif

/* Workers: the delivery that each has popped, whether it has claimed it, and whether its handler runs. */
byte job[2];
bool claimed[2];
bool runs[2];
bool lapsed[2];  /* its lease has passed since the claim and was not renewed: it may have lost the row */

/* Only properties read these. */
bool handled;  /* a handler has returned */
byte starts;   /* how many times a handler has begun */
bool refused;  /* a handler has raised SkipRetry */
mtype ended;   /* done or dead, once the row has had that status */

#define HOLDS(w) (claimed[w] && job[w] == delivery)
#define IN_HAND(w) (!claimed[w] && job[w] == delivery)
#define LEAVES(w) (runs[w] && !claimed[w] && !lapsed[w])  /* it has cut its row short and has not exited yet */

/* ---- The parts of the design, and the mutations that remove them ---- */

#ifdef NO_FENCE
#define IS_NEWEST true
#else
#define IS_NEWEST (job[me] == delivery)
#endif

#ifdef IGNORE_TIME
#define IS_TIME true
#else
#define IS_TIME due
#endif

#define IS_MINE (status == enqueued && IS_NEWEST && IS_TIME)
#define IS_RUNNING_MINE (status == running && IS_NEWEST)

#ifdef JUDGE_FIRST
bool has_looked[2], saw_mine[2];
#define HAS_LOOKED has_looked[me]
#define JUDGEMENT saw_mine[me]
#define UNLOOK has_looked[me] = false; saw_mine[me] = false
#else
#define HAS_LOOKED true
#define JUDGEMENT IS_MINE
#define UNLOOK skip
#endif

#ifdef MARK_FIRST
#define AT_CLAIM done
#else
#define AT_CLAIM running
#endif

#ifdef HASTY_SWEEP
#define MAY_OUTRUN true
#define OUTRUN skip
#else
#define MAY_OUTRUN MAY_FAIL
#define OUTRUN FAIL
#endif

#ifdef HASTY_RESCUE
#define RESCUES_ALL true
#else
#define RESCUES_ALL false
#endif

#ifdef ENDLESS_RESCUE
#define RESCUES_FOREVER true
#else
#define RESCUES_FOREVER false
#endif

#ifdef GIVE_BACK_AT_ONCE
#define GIVES_BACK_AT_ONCE true
#else
#define GIVES_BACK_AT_ONCE false
#endif

#ifdef UNCOUNTED
#define COUNTED (attempt - 1)
#else
#define COUNTED attempt
#endif

#ifdef RETRY_AT_ONCE
#define RETRIES_AT_ONCE true
#else
#define RETRIES_AT_ONCE false
#endif

#ifdef LET_GO_OVERDUE
#define LETS_GO_OVERDUE true
#else
#define LETS_GO_OVERDUE false
#endif

/* ---- The properties ---- */

/* A committed row is eventually done or dead. */
ltl eventually { [] (status != absent -> <> (status == done || status == dead)) }

/*
 * No handler of a row begins while an earlier one runs, unless the lease of one has passed. The lease of a worker that
 * is alive and reaches Postgres never passes, however long the handler takes.
 */
#define ALONE !(runs[0] && runs[1] && !lapsed[0] && !lapsed[1])
ltl alone { [] ALONE }

/* Without that condition it holds only without faults: no lease can stop a frozen handler. */
ltl never_two { [] !(runs[0] && runs[1]) }

/* A done row stays done; a dead row stays dead unless an operator retries it. */
#define FINAL (ended == 0 || status == ended)
ltl final { [] FINAL }

/* A row is done only if a handler returned, and dead only if its attempts are used up or a handler refused it. */
#define TRUTHFUL ((status != done || handled) && (status != dead || attempts > RETRIES || refused))
ltl truthful { [] TRUTHFUL }

/*
 * There are no more attempts than max_retries allows, handlers begin no more often, and each hand-over after the first
 * follows a failed attempt or a fault.
 */
#define BOUNDED (attempts <= 1 + RETRIES && starts <= (1 + RETRIES) * (1 + REVIVALS) && delivery <= HANDOVERS)
ltl bounded { [] BOUNDED }

/* A row that was never committed is not handled, whatever Redis says. */
#define OURS (status != absent || (!runs[0] && !runs[1]))
ltl ours { [] OURS }

/* All safety properties in one search. */
ltl safe { [] (ALONE && FINAL && TRUTHFUL && BOUNDED && OURS) }

/* ---- The relays ---- */

/*
 * A hand-over: lock, write to Redis, commit. The relay holds the lock throughout. A crash in between, an error of Redis
 * and Postgres' idle-in-transaction timeout undo everything except the write to Redis. So a delivery may be written to
 * Redis twice, but is committed only once.
 */
proctype Publish(byte me) {
  byte next;

  do
  :: d_step { status == pending && lock == 0 && delivery < MAX_DELIVERY -> lock = me; next = delivery + 1 };
    if
    :: d_step { HAS_ROOM(next) -> PUT_JOB(next) }
    :: !HAS_ROOM(next)
    :: d_step { lock == me && MAY_FAIL -> FAIL; lock = 0 }  /* Redis is away, or the relay crashes */
    fi;
    if
    :: d_step { lock == me -> status = enqueued; delivery = next; lock = 0; next = 0 }
    :: d_step { lock == me && MAY_FAIL -> FAIL; lock = 0; next = 0 }  /* it crashes, or Redis' answer is lost */
    :: d_step { lock != me -> next = 0 }  /* Postgres has ended its session; Redis keeps the job */
    fi
  od
}

/*
 * A sweep: it looks, and a little later checks the row again and takes it back, so that relays may sweep side by side.
 * The time between is long enough for a worker to claim what it has popped. If it is not, that is a fault, and the
 * fence must make it harmless.
 */
#define IS_LOST (status == enqueued && delivery == seen)

proctype Sweep() {
  byte seen;

#ifdef NO_SWEEP
  false;
#endif
  do
  :: d_step { status == enqueued -> seen = delivery };  /* Postgres first … */
    if  /* … and Redis second: a missing job was popped, or is lost */
    :: d_step { MAY_FAIL -> FAIL; seen = 0 }  /* Redis is away, or the relay crashes */
    :: d_step { HAS_JOB(seen) -> seen = 0 }
    :: d_step { HAS_NO_JOB(seen) };
      if
      :: d_step { MAY_FAIL -> FAIL; seen = 0 }  /* a crash */
#ifdef NO_RECHECK
      :: d_step { status = pending; lease = false; seen = 0 }
#else
      :: d_step { !IS_LOST -> seen = 0 }
      :: d_step { IS_LOST && !IN_HAND(0) && !IN_HAND(1) -> status = pending; seen = 0 }
      :: d_step { IS_LOST && (IN_HAND(0) || IN_HAND(1)) && MAY_OUTRUN -> OUTRUN; status = pending; seen = 0 }
#endif
      fi
    fi
  od
}

/* A rescue, by any relay: it holds the row's lock from its look to its write, so it is one step. */
proctype Rescue() {
#ifdef NO_RESCUE
  false;
#endif
  do
  :: d_step {
      status == running && (!lease || RESCUES_ALL) ->
      lease = false;
      if
      :: attempts > RETRIES && !RESCUES_FOREVER -> status = dead; ended = dead
      :: else -> status = pending; due = (attempts == 1)  /* from the second rescue on, it waits for its backoff */
      fi
    }
  od
}

/* ---- The workers ---- */

#define IS_IDLE (job[me] == 0 && !runs[me])
#define HAS_POPPED (job[me] != 0 && !claimed[me])
#define WAITS (claimed[me] && !runs[me] && outcome == 0)
#define HANDLES (claimed[me] && runs[me])
#define HAS_OUTCOME (claimed[me] && outcome != 0)
#define IS_LEAVING (runs[me] && !claimed[me])

#define POP(d) :: d_step { IS_IDLE && HAS_JOB(d) && due -> TAKE_JOB(d); job[me] = d } \
               :: d_step { IS_IDLE && HAS_JOB(d) && !due && MAY_FAIL -> FAIL; TAKE_JOB(d); job[me] = d }  /* early */

#define FORGET job[me] = 0; claimed[me] = false; runs[me] = false; lapsed[me] = false; outcome = 0; attempt = 0; UNLOOK

/*
 * A worker, as seen by one row: it pops, claims, runs, completes. It may crash anywhere, and restarts. A step that
 * waits for the lock waits for a relay's commit and sees the committed row.
 */
proctype Worker(bit me) {
  byte attempt;
  mtype outcome;

  do
  POP(1) POP(2) POP(3) POP(4) POP(5) POP(6) POP(7)

  /* The claim locks first and judges after. */
  :: d_step {
      HAS_POPPED && lock == 0 && HAS_LOOKED ->
      if
      :: JUDGEMENT ->
        status = AT_CLAIM;
        attempts++;
        job[me] = delivery;
        lease = (status == running);
        attempt = attempts;
        claimed[me] = true
      :: else -> FORGET
      fi
    }

  /* A thread begins the row; or none is free for too long, and the row is given back, due at once and not counted. */
  :: d_step { WAITS -> runs[me] = true; starts++ }
  :: d_step {
      WAITS && lock == 0 && MAY_FAIL ->
      FAIL;
      if
      :: IS_RUNNING_MINE ->
        status = pending;
        attempts = attempt - 1;
        lease = false;
        due = true
      :: else
      fi;
      FORGET
    }

  /* The handler returns, raises, or raises SkipRetry. */
  :: d_step { HANDLES -> runs[me] = false; handled = true; outcome = done }
  :: d_step { HANDLES -> runs[me] = false; outcome = (attempt > RETRIES -> dead : pending) }
  :: d_step { HANDLES -> runs[me] = false; refused = true; outcome = dead }

  /* A renewal: a lease that has passed is valid again, if no rescue took the row. */
  :: d_step { claimed[me] && lapsed[me] && lock == 0 && IS_RUNNING_MINE -> lease = true; lapsed[me] = !HOLDS(me) }

  /* The completion. A worker that the fence rejects writes nothing. */
  :: d_step {
      HAS_OUTCOME && lock == 0 ->
      if
      :: IS_RUNNING_MINE ->
        status = outcome;
        attempts = attempt;
        lease = false;
        due = (outcome != pending);  /* the backoff */
        ended = (outcome != pending -> outcome : ended)
      :: else
      fi;
      FORGET
    }

  /* Cutting short: the handler is overdue, or the worker is stopped before it ends. The worker exits after this. */
  :: d_step {
      HANDLES && lock == 0 ->
      if
      :: IS_RUNNING_MINE ->
        status = (COUNTED > RETRIES -> dead : pending);
        attempts = COUNTED;
        lease = false;
        due = GIVES_BACK_AT_ONCE;  /* if the row is dead, an operator's retry waits for the exit too */
        ended = (status == dead -> dead : ended)
      :: else
      fi;
      claimed[me] = false;
      job[me] = 0
    }
  :: d_step { IS_LEAVING -> FORGET }

  :: d_step { (HAS_POPPED || claimed[me]) && MAY_FAIL -> FAIL; FORGET }  /* a crash */

#ifdef JUDGE_FIRST
  :: d_step { HAS_POPPED && !has_looked[me] -> has_looked[me] = true; saw_mine[me] = IS_MINE }
#endif
#ifdef TRUST_REDIS
  :: d_step { HAS_POPPED -> claimed[me] = true; runs[me] = true }
#endif
  od
}

/* ---- Time, and faults of locks and of Redis ---- */

proctype Time() {
  do
  /* A row that was cut short is not due before its worker has exited, unless the exit takes too long: a fault. */
  :: d_step { (status == pending || status == enqueued) && !due && !LEAVES(0) && !LEAVES(1) -> due = true }
  :: d_step { !due && LEAVES(0) && MAY_FAIL -> FAIL; lapsed[0] = true }
  :: d_step { !due && LEAVES(1) && MAY_FAIL -> FAIL; lapsed[1] = true }
  /* The lease of a dead worker passes; that of a live one only if it cannot renew in time: a fault. */
  :: d_step { lease && !HOLDS(0) && !HOLDS(1) -> lease = false }
  :: d_step {
      lease && (HOLDS(0) || HOLDS(1)) && MAY_FAIL ->
      FAIL; lease = false; lapsed[0] = lapsed[0] || HOLDS(0); lapsed[1] = lapsed[1] || HOLDS(1)
    }
  :: d_step { LETS_GO_OVERDUE && lease && ((HOLDS(0) && runs[0]) || (HOLDS(1) && runs[1])) -> lease = false }
  /* idle_in_transaction_session_timeout, or a connection that broke. */
  :: d_step { lock != 0 && MAY_FAIL -> FAIL; lock = 0 }
  od
}

#ifndef CHAOS
#define LOSE(d) :: d_step { HAS_JOB(d) && MAY_FAIL -> FAIL; TAKE_JOB(d) }
#define INVENT(d) :: d_step { HAS_ROOM(d) && MAY_FAIL -> FAIL; PUT_JOB(d) }

proctype Redis() {
  byte d;

  do
  LOSE(1) LOSE(2) LOSE(3) LOSE(4) LOSE(5) LOSE(6) LOSE(7)
  INVENT(1) INVENT(2) INVENT(3) INVENT(4) INVENT(5) INVENT(6) INVENT(7)
  :: d_step {  /* FLUSHALL */
      MAY_FAIL -> FAIL;
      for (d : 1 .. 7) { jobs[d] = 0 }
      d = 0
    }
  od
}
#endif

/* ---- The operator, and the service ---- */

#if REVIVALS
proctype Operator() {
  byte left = REVIVALS;

  do
  :: d_step {
      status == dead && left > 0 ->
      left--; status = pending; attempts = 0; due = (due || RETRIES_AT_ONCE); ended = 0; refused = false
    }
  od
}
#endif

init {
  atomic {
    run Publish(1); run Publish(2);
    run Sweep(); run Sweep();
    run Rescue();
    run Worker(0); run Worker(1);
    run Time();
#if REVIVALS
    run Operator();
#endif
#ifndef CHAOS
    run Redis()
#endif
  }
  /* The row is committed with its user, or the client gets an error. */
  if
  :: status = pending
  :: skip
  fi
}
