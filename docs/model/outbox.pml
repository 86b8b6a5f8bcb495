/*
 * The life of one outbox row, with everybody who touches it and everything that may go wrong.
 *
 * Postgres is the truth: what it does in one transaction is one step here, but for the relay's, which holds the row's
 * lock while it talks to Redis. Redis is disposable: it forgets, repeats and invents jobs. Time is only an order: what
 * takes "long enough" in production may happen at any moment here, unless a guard says what it waits for.
 *
 * README.md says what is left out and why, which statement each step is, and how to read a counterexample.
 *
 * Macros that choose what is checked:
 *   RETRIES    max_retries of the row
 *   FAULTS     how many things may go wrong in one run
 *   REVIVALS   how many times an operator retries the row when it is dead
 *   CHAOS      no limit to what goes wrong, but the row is handed over CHAOS times at most; for safety only
 * Macros that break the design, one each, so that a property must fail: the mutations in README.md.
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
 * "Eventually" means: once things stop going wrong. Against a Redis that forgets every job for ever, or workers that
 * crash for ever, no design can finish a row, and a checker would report just that. A budget that may be spent at any
 * moment, on any kind of fault, and need not be spent, is the same as "finitely many faults", up to its size.
 */
#ifdef CHAOS
#define MAY_FAIL true
#define FAIL skip
#define MOST CHAOS
#else
byte faults = FAULTS;
#define MAY_FAIL (faults > 0)
#define FAIL faults--
#define MOST (HANDOVERS + 1)  /* one too many, so that `bounded` can fail */
#endif

/* Each hand-over after the first has a cause: an attempt that failed, or a fault. */
#define HANDOVERS ((1 + RETRIES) * (1 + REVIVALS) + FAULTS)

/* Postgres: the row, and who holds its lock across steps (a relay; 0 is nobody). */
mtype = { absent, pending, enqueued, running, done, dead };
mtype status = absent;
byte delivery;
byte attempts;
bool due;       /* run_at has passed; only read while the row is pending or enqueued */
bool lease;     /* lease_until has not passed; false while there is none */
byte lock;

/*
 * Redis: how many jobs it holds of each delivery, in the queue or in rq-scheduler's set: from the set a worker is
 * given one once the row is due. Two of a kind behave like any more; one delivery is beyond the row's last, so that a
 * stranger can name it. Under CHAOS Redis has no memory: it says this now and that then.
 */
#define COPIES 2
#ifdef CHAOS
#define HAS_JOB(d) (d <= MOST + 1)
#define HAS_NO_JOB(d) true
#define HAS_ROOM(d) true
#define PUT_JOB(d) skip
#define TAKE_JOB(d) skip
#else
byte jobs[8];
#define HAS_JOB(d) (jobs[d] > 0)
#define HAS_NO_JOB(d) (jobs[d] == 0)
#define HAS_ROOM(d) (d <= MOST + 1 && jobs[d] < COPIES)
#define PUT_JOB(d) jobs[d]++
#define TAKE_JOB(d) jobs[d]--
#endif

/* Workers: what each has popped, whether it has claimed that, and whether its handler runs. */
byte job[2];
bool claimed[2];
bool runs[2];
bool lapsed[2];  /* since the claim its lease has passed, and was not renewed: it may have lost the row */

/* Seen by properties alone. */
bool handled;  /* a handler has returned */
byte starts;   /* how often a handler has begun */
bool refused;  /* a handler has raised SkipRetry */
mtype ended;   /* done or dead, once the row has been so */

#define HOLDS(w) (claimed[w] && job[w] == delivery)
#define IN_HAND(w) (!claimed[w] && job[w] == delivery)
#define LEAVES(w) (runs[w] && !claimed[w] && !lapsed[w])  /* has given its row back, and has not exited yet */

/* ---- What the design stands on, and the mutations that take it away ---- */

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
#define RESCUES_FOR_EVER true
#else
#define RESCUES_FOR_EVER false
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
 * No handler of a row begins while an earlier one runs, unless the lease of one has passed: in a worker that lives and
 * reaches Postgres it never does, however long the handler takes.
 */
#define ALONE !(runs[0] && runs[1] && !lapsed[0] && !lapsed[1])
ltl alone { [] ALONE }

/* Without that condition it does not hold, unless nothing goes wrong: no lease can stop a handler that is frozen. */
ltl never_two { [] !(runs[0] && runs[1]) }

/* What is done stays done; what is dead stays dead, unless an operator retries it. */
#define FINAL (ended == 0 || status == ended)
ltl final { [] FINAL }

/* Done are only rows that a handler has handled, dead only those that used up their attempts or were refused. */
#define TRUTHFUL ((status != done || handled) && (status != dead || attempts > RETRIES || refused))
ltl truthful { [] TRUTHFUL }

/*
 * There are no more attempts than max_retries allows, no handler begins more often, and there are no more hand-overs
 * than attempts and faults explain.
 */
#define BOUNDED (attempts <= 1 + RETRIES && starts <= (1 + RETRIES) * (1 + REVIVALS) && delivery <= HANDOVERS)
ltl bounded { [] BOUNDED }

/* A row that was never committed is not handled, whatever Redis says. */
#define OURS (status != absent || (!runs[0] && !runs[1]))
ltl ours { [] OURS }

/* All that must never happen, in one search. */
ltl safe { [] (ALONE && FINAL && TRUTHFUL && BOUNDED && OURS) }

/* ---- The relays ---- */

/*
 * A hand-over: claim, write to Redis, commit. The lock is held from the first to the last. A crash in between, an
 * error of Redis and Postgres' idle-in-transaction time-out undo all but what Redis was told: so a delivery may be
 * written to Redis twice, and committed once only.
 */
proctype Publish(byte me) {
  byte next;

  do
  :: d_step { status == pending && lock == 0 && delivery < MOST -> lock = me; next = delivery + 1 };
    if
    :: d_step { HAS_ROOM(next) -> PUT_JOB(next) }
    :: !HAS_ROOM(next)
    :: d_step { lock == me && MAY_FAIL -> FAIL; lock = 0 }  /* Redis is away, or the relay crashes */
    fi;
    if
    :: d_step { lock == me -> status = enqueued; delivery = next; lock = 0; next = 0 }
    :: d_step { lock == me && MAY_FAIL -> FAIL; lock = 0; next = 0 }  /* it crashes, or lacks Redis' answer */
    :: d_step { lock != me -> next = 0 }  /* Postgres took it for gone; what it told Redis stays told */
    fi
  od
}

/*
 * A sweep: a look, and a moment later the taking back, which judges anew, so that relays may sweep side by side. The
 * moment is long enough for a worker to claim what it has popped; where it is not, that is a fault, which the fence
 * must bear.
 */
#define IS_LOST (status == enqueued && delivery == seen)

proctype Sweep() {
  byte seen;

#ifdef NO_SWEEP
  false;
#endif
  do
  :: d_step { status == enqueued -> seen = delivery };  /* Postgres first … */
    if  /* … and Redis after: what is missing now was popped, or is lost */
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

/* A rescue, whichever relay runs it: it holds the row's lock from its look to its write, and so is one step. */
proctype Rescue() {
#ifdef NO_RESCUE
  false;
#endif
  do
  :: d_step {
      status == running && (!lease || RESCUES_ALL) ->
      lease = false;
      if
      :: attempts > RETRIES && !RESCUES_FOR_EVER -> status = dead; ended = dead
      :: else -> status = pending; due = (attempts == 1)  /* from the second time on it waits */
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
 * A worker, as far as one row goes: it pops, claims, runs, completes. It may crash anywhere, and starts anew. What waits
 * for the lock waits for a relay's commit, and sees what that has committed.
 */
proctype Worker(bit me) {
  byte attempt;
  mtype outcome;

  do
  POP(1) POP(2) POP(3) POP(4) POP(5) POP(6) POP(7)

  /* The claim: it locks first and judges after. */
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

  /* A thread is free for the row; or none is for so long that it is given back unbegun, at once and for nothing. */
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

  /* Renewing: a lease that has passed is had again, if nobody saw that. */
  :: d_step { claimed[me] && lapsed[me] && lock == 0 && IS_RUNNING_MINE -> lease = true; lapsed[me] = !HOLDS(me) }

  /* The completion. The loser of the fence writes nothing. */
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

  /* The handler is overdue, or the worker is stopped before it ends: the worker writes that, and then exits. */
  :: d_step {
      HANDLES && lock == 0 ->
      if
      :: IS_RUNNING_MINE ->
        status = (COUNTED > RETRIES -> dead : pending);
        attempts = COUNTED;
        lease = false;
        due = GIVES_BACK_AT_ONCE;  /* where the row is dead, an operator's retry waits for the exit as well */
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

/* ---- Time, and what else happens to the row, its locks and Redis ---- */

proctype Time() {
  do
  /* A row that was given back is not due before its worker has exited, unless that takes longer than it may. */
  :: d_step { (status == pending || status == enqueued) && !due && !LEAVES(0) && !LEAVES(1) -> due = true }
  :: d_step { !due && LEAVES(0) && MAY_FAIL -> FAIL; lapsed[0] = true }
  :: d_step { !due && LEAVES(1) && MAY_FAIL -> FAIL; lapsed[1] = true }
  /* The lease of a worker that is gone passes; that of a living one only if it cannot renew it in time. */
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
