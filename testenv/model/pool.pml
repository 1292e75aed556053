/*
 * pool.pml: what two nodes agree on about one pool of keys, for the model
 * checker spin. docs/model.md says what is modelled, how it is run, and which
 * line is which function of the code; run.sh has the sizes and the mutations.
 *
 * Two processes, one for each node. Every step is one atomic sequence: what a
 * node does with the pool's turn (kms/kma), or one message of the KSA. Steps of
 * the two nodes, of the network and of the faults come in every order.
 *
 * Sizes (-D): K keys, KPB keys in a block, CRASHES restarts at any moment,
 * RESTORES restarts with an older disk of one node, STALES messages kept by the
 * network and delivered later, any number of times. Parts (-D): M102 (blocks
 * are taken in and validated; otherwise they are there at first), TRANSFER,
 * EXPIRY (keys expire unused), FLOOR (taken keys that are put back, notices that expire unsent, the sweep).
 * With SUPPLY_ONLY only the claims on what is supplied are checked: many a
 * mutation breaks the agreement long before it breaks them. TRANSIT_ONLY leaves
 * of those at GetKey only the ones on transfer and bytes.
 */
#ifndef K
#define K 4
#endif
#ifndef KPB
#define KPB K
#endif
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef RESTORES
#define RESTORES 0
#endif
#ifndef STALES
#define STALES 1
#endif

/* With TELL, replaying a trail says what happened in words (run.sh trail). */
#ifdef TELL
#define SAY(what) printf what
#else
#define SAY(what)
#endif

/* Search by breadth, for short trails, knows no hidden variables. */
#ifdef BREADTH
#define SCRATCH
#else
#define SCRATCH hidden
#endif

#define NB (K / KPB)
#define A 0 /* the master: owns the even indices, which are positions 1, 3, ... */
#define B 1

/* Keys are sets of bits; position p, counted from 1, is bit p-1. key.Role.Owns. */
#define OF(n) ((n) == A -> 5 : 10)
#define UPTO(p) ((1 << (p)) - 1)
#define BLOCKOF(p) (((p) - 1) / KPB)
#define BLOCK(b) (((1 << KPB) - 1) << ((b) * KPB))
#if K / KPB == 1
#define KEYS(blocks) (((blocks) & 1) * BLOCK(0))
#define BLOCKS(keys) (((keys) & BLOCK(0)) != 0)
#else
#define KEYS(blocks) ((((blocks) & 1) * BLOCK(0)) | ((((blocks) >> 1) & 1) * BLOCK(1)))
#define BLOCKS(keys) ((((keys) & BLOCK(0)) != 0) | ((((keys) & BLOCK(1)) != 0) << 1))
#endif

/* What is on disk: kms/store's node and pool rows and blocks. */
typedef Disk {
	byte gen;    /* Store.Generation */
	byte mark;   /* PoolInfo.Mark */
	byte pmark;  /* PoolInfo.PeerMark */
	byte pgen;   /* PoolInfo.PeerGeneration */
	byte newest; /* PoolInfo.NewestSeq: blocks taken in so far */
	byte rcv;    /* blocks that are received */
	byte act;    /* blocks that are active */
};
Disk disk[2], snap;
byte snapof = 2; /* whose disk snap is; 2: nobody's yet, 3: put back */

/* Keys of n that no mark has passed: what store.Load could still give. */
#define ONDISK(n, blocks) (KEYS(blocks) & ~(OF(n) & UPTO(disk[n].mark)) & ~(OF(1 - (n)) & UPTO(disk[n].pmark)))
#define ACTIVE(n) ONDISK(n, disk[n].act)

/* What is in memory: kma's pool and session, ksa's queue and inbox. */
typedef Mem {
	byte inst;     /* Agent.instance; never twice */
	byte pinst;    /* peerInstance, 0: none met */
	byte pgen;     /* peerGeneration */
	bool named;    /* the peer has named us: it has our generation from us */
	bool synced;
	bool burndue;
	bool changed;  /* epoch is not that of when the call under way began */
	byte own;      /* keys to take: of our leases, and given to us */
	byte held;     /* keys to claim: of the peer's leases, and given by us */
	byte pkeys;    /* pending: keys of the lease that is announced, 0: none */
	byte pafter;
	byte pmark;
	byte pseqs;
	byte pgive;    /* its purpose: 0 supply, 1 transfer, 2 expired */
	byte lafter;   /* lastAfter, lastLease, lastMissing: the peer's last lease */
	byte llease;
	byte lmissing;
	byte issued;   /* queue: notices that the peer has not acknowledged */
	byte noticed;  /* inbox: arrivals, not fetched, not expired */
	byte burned;   /* session.burned: our mark when the session began */
#ifdef FLOOR
	byte taken;    /* taken by GetKey, neither supplied nor put back */
	byte floor;    /* told with a lease */
	byte floors;   /* the highest that the peer told */
#ifdef TRANSFER
	byte gburned;  /* session.givenBurned: the peer's mark when the session began */
	byte gfloor;   /* of keys given to us, told with WANT */
	byte gfloors;  /* the highest that the peer told */
#endif
#endif
};
Mem mem[2];

/* The network. A node has one call under way: cur, first the request, then the
 * answer; late is one message of its that comes later, perhaps again. */
#define IDLE 0
#define ASKED 1
#define ANSWERED 2
#define SYNC 1
#define BURN 2
#define LEASE 3
#define VALIDATE 4
#define WANT 5
#define OK 0
#define NOTSYNCED 1
#define NOTVALIDATED 2
#define CONFLICT 3
typedef Msg {
	byte type;
	byte code;   /* of an answer */
	byte from;   /* instances */
	byte to;
	byte gen;
	byte pgen;   /* SYNC: of the other end, as its speaker knows it */
	byte mark;   /* SYNC, LEASE: mark; BURN: up to */
	byte after;  /* LEASE: after; SYNC: peer mark */
	byte act;    /* SYNC: active blocks; LEASE: seqs, answer: missing; VALIDATE: items, answer: agreed */
	byte rcv;    /* SYNC: received blocks; VALIDATE, answer: mismatch or never */
	byte newest; /* SYNC */
	byte give;   /* LEASE: the purpose, as pgive */
	byte floor;  /* LEASE, WANT */
};
Msg cur[2], late[2];
byte call[2];  /* IDLE, ASKED, ANSWERED */
byte sent[2];  /* notices on their way, for ever: they may come at any time */

byte crashes = CRASHES, restores = RESTORES, stales = STALES;
byte bad; /* blocks of which the two ends have different bytes */

/* What the claims remember; no node reads it. */
byte gave[2];   /* keys that GetKey of n supplied */
byte got[2];    /* keys that GetKeyWithID of n supplied */
byte burned[2]; /* keys that BURN destroyed at n */
byte avail[2];  /* keys that n has with a notice, in this process */
byte refused[2]; /* SYNCs of n that were answered with a later generation than n's */
byte transit;   /* keys given up by their owner and not durably taken */
byte expired;   /* keys that their owner has let expire */

/* The claims. Each is a variable of its own, so that a trail names it. */
SCRATCH byte once_per_side, one_owner, same_bytes, not_in_transfer, notice_first, burned_stays_gone,
	noticed_stays, active_on_both_or_neither, leased_on_both_or_neither, stranded_on_both, sync_gets_on, expired_stays_gone;
#define CLAIM(name, holds) name = (holds); assert(name)

/* Scratch; not part of a state. */
SCRATCH byte h_type, h_code, h_from, h_to, h_gen, h_pgen, h_mark, h_after, h_act, h_rcv, h_newest, h_floor, h_give;
SCRATCH byte r_code, r_act, r_rcv, keys, p, k;
SCRATCH byte died, ok, fresh, other, asked;

#define READ(m) h_type = m.type; h_code = m.code; h_from = m.from; h_to = m.to; h_gen = m.gen; h_pgen = m.pgen; h_mark = m.mark; h_after = m.after; \
	h_act = m.act; h_rcv = m.rcv; h_newest = m.newest; h_give = m.give; h_floor = m.floor
#define COPY(m, o) m.type = o.type; m.code = o.code; m.from = o.from; m.to = o.to; m.gen = o.gen; m.pgen = o.pgen; m.mark = o.mark; m.after = o.after; \
	m.act = o.act; m.rcv = o.rcv; m.newest = o.newest; m.give = o.give; m.floor = o.floor
#define CLEAR(m) m.type = 0; m.code = 0; m.from = 0; m.to = 0; m.gen = 0; m.pgen = 0; m.mark = 0; m.after = 0; \
	m.act = 0; m.rcv = 0; m.newest = 0; m.give = 0; m.floor = 0
#define COPYDISK(d, o) d.gen = o.gen; d.mark = o.mark; d.pmark = o.pmark; d.pgen = o.pgen; d.newest = o.newest; d.rcv = o.rcv; d.act = o.act

/* crashpoint: after each durable write of a step that has several. */
inline crashpoint() {
	if
	:: crashes > 0 -> crashes--; died = true; SAY(("  dies after that write\n"))
	:: true
	fi
}

/* drop: blocks of which no key will be read again. store.dropDone */
inline drop(n) {
	if
	:: !ONDISK(n, 1) -> disk[n].rcv = disk[n].rcv & ~1; disk[n].act = disk[n].act & ~1
	:: else
	fi;
#if K / KPB > 1
	if
	:: !ONDISK(n, 2) -> disk[n].rcv = disk[n].rcv & ~2; disk[n].act = disk[n].act & ~2
	:: else
	fi
#endif
}

inline endcall(n) { call[n] = IDLE; CLEAR(cur[n]) }

/* start: the process is gone, memory with it; a new one begins. store.begin, kma.New */
inline start(n) {
	disk[n].gen++;
	mem[n].inst++;
	mem[n].pinst = 0; mem[n].pgen = 0; mem[n].named = false; mem[n].synced = false; mem[n].burndue = true; mem[n].changed = false;
	mem[n].own = 0; mem[n].held = 0;
	mem[n].pkeys = 0; mem[n].pafter = 0; mem[n].pmark = 0; mem[n].pseqs = 0; mem[n].pgive = 0;
	mem[n].lafter = 0; mem[n].llease = 0; mem[n].lmissing = 0;
	mem[n].issued = 0; mem[n].noticed = 0; mem[n].burned = 0;
#ifdef FLOOR
	mem[n].taken = 0; mem[n].floor = 0; mem[n].floors = 0;
#ifdef TRANSFER
	mem[n].gburned = 0; mem[n].gfloor = 0; mem[n].gfloors = 0;
#endif
#endif
	avail[n] = 0; refused[n] = 0;
	endcall(n);
	died = false;
#ifdef BUG_NO_SYNC
	mem[n].synced = true; mem[n].burndue = false;
	mem[n].pinst = mem[1 - n].inst; mem[n].pgen = disk[1 - n].gen;
	mem[1 - n].pinst = mem[n].inst; mem[1 - n].pgen = disk[n].gen
#endif
}

/* send: cur is a new request; the network may keep a copy. */
inline send(n) {
	call[n] = ASKED;
	mem[n].changed = false;
	if
	:: stales > 0 -> stales--; COPY(late[n], cur[n]); SAY(("  (it may come again, late)\n"))
	:: true
	fi
}

inline link(n) { cur[n].from = mem[n].inst; cur[n].to = mem[n].pinst }

/* say: our side of a sync, into cur[whom]. pool.state */
inline say(who, whom) {
	CLEAR(cur[whom]);
	cur[whom].type = SYNC; cur[whom].from = mem[who].inst; cur[whom].gen = disk[who].gen;
	cur[whom].to = mem[who].pinst;
	cur[whom].pgen = (disk[who].pgen > mem[who].pgen -> disk[who].pgen : mem[who].pgen);
	cur[whom].mark = disk[who].mark; cur[whom].after = disk[who].pmark;
	cur[whom].newest = disk[who].newest; cur[whom].rcv = disk[who].rcv; cur[whom].act = disk[who].act
}

/* forget: the lease that is on its way is burned. pool.dropPending */
inline forget(n) { mem[n].pkeys = 0; mem[n].pafter = 0; mem[n].pmark = 0; mem[n].pseqs = 0; mem[n].pgive = 0 }

/* reset: the session ends; our leased keys have no use any more. pool.reset,
 * and what step does with a pending lease of another epoch */
inline reset(n, upto) {
#ifndef BUG_RESET_KEEPS_OWN
	mem[n].own = 0;
#endif
	forget(n);
	mem[n].pinst = 0; mem[n].synced = false; mem[n].burndue = true; mem[n].changed = true;
#if defined(FLOOR) && defined(TRANSFER)
	mem[n].gburned = disk[n].pmark;
#endif
	if
#ifndef BUG_FORGET_LAST_LEASE
	:: !other
#endif
	:: else -> mem[n].lafter = 0; mem[n].llease = 0; mem[n].lmissing = 0
	fi;
	if
	:: mem[n].burned < (upto) -> mem[n].burned = (upto)
	:: else
	fi
}

/* judge: a block that can never be active on both sides. pool.hopeless */
inline judge(n, b) {
	if
	:: died || !ONDISK(n, 1 << (b))
	:: else ->
		if
		:: (disk[n].act >> (b)) & 1 && ((h_act >> (b)) & 1 || ((h_rcv >> (b)) & 1 && n == B))
		:: (disk[n].rcv >> (b)) & 1 && ((h_rcv >> (b)) & 1 || ((h_act >> (b)) & 1 && n == A) || (!((h_act >> (b)) & 1) && (b) >= h_newest))
		:: !((disk[n].act | disk[n].rcv) >> (b) & 1)
		:: else -> disk[n].act = disk[n].act & ~(1 << (b)); disk[n].rcv = disk[n].rcv & ~(1 << (b)); crashpoint()
		fi
	fi
}

/* meet: what the peer says of itself, in h_. pool.meet; ok if it was heard */
inline meet(n) {
	ok = !(h_gen < disk[n].pgen || h_gen < mem[n].pgen);
	fresh = h_from != mem[n].pinst;
	other = fresh;
	if
	:: ok && h_after > disk[n].mark -> /* our store was restored: store.AdoptMark(Own) */
		reset(n, h_after);
		fresh = true;
#ifndef BUG_NO_ADOPT
		disk[n].mark = h_after;
		crashpoint()
#endif
	:: else
	fi;
	if
	:: ok && !fresh -> mem[n].pgen = h_gen /* it may have been raised */
	:: ok && fresh && !died ->
		if
		:: disk[n].mark > h_after -> k = disk[n].mark
		:: else -> k = h_after
		fi;
		reset(n, k);
		if
		:: h_mark > disk[n].pmark -> disk[n].pmark = h_mark; crashpoint() /* store.AdoptMark(Other) */
		:: else
		fi;
		judge(n, 0);
#if K / KPB > 1
		judge(n, 1);
#endif
		mem[n].pgen = h_gen;
		mem[n].pinst = h_from
	:: else
	fi
}

#define STRANGER(n) (h_to != mem[n].inst || h_from != mem[n].pinst || h_from == 0)

/* onLease. pool.onLease, checkBlocks, hold */
inline onLease(n) {
	if
#ifndef BUG_NO_LINK
	:: STRANGER(n) || h_gen != mem[n].pgen -> r_code = NOTSYNCED
#endif
	:: else ->
		if
		:: h_mark == mem[n].llease && h_after == mem[n].lafter -> r_act = mem[n].lmissing /* its answer was lost */
		:: else ->
			if
			:: h_after < disk[n].pmark -> r_code = CONFLICT
			:: h_after >= disk[n].pmark && ((h_act & disk[n].rcv) || BLOCKOF(h_mark) >= disk[n].newest) -> r_code = NOTVALIDATED
			:: else ->
				/* store.Advance(Other), durable; then store.Load */
				keys = ACTIVE(n) & OF(1 - n) & UPTO(h_mark) & ~UPTO(h_after);
#ifndef BUG_ACK_BEFORE_WRITE
				disk[n].pmark = h_mark; disk[n].pgen = h_gen;
#endif
				r_act = h_act & ~BLOCKS(keys);
				keys = keys & KEYS(h_act);
				if
				:: h_give == 1 -> mem[n].own = mem[n].own | keys; transit = transit & ~keys
				:: h_give == 2 -> skip /* store.Expire(Other): nothing is read */
				:: h_give == 0 -> mem[n].held = mem[n].held | keys
				fi;
				mem[n].lafter = h_after; mem[n].llease = h_mark; mem[n].lmissing = r_act;
#ifdef FLOOR
				mem[n].floors = h_floor
#endif
			fi
		fi
	fi
}

/* onBurn: of the sender's own keys those up to its mark, of those that were given
 * to it those from before this session. pool.onBurn, drop; ksa.KeepOnBurn */
inline onBurn(n) {
	if
	:: STRANGER(n) || h_gen != mem[n].pgen -> r_code = NOTSYNCED
	:: else ->
#ifdef BUG_BURN_ANY_OWNER
		keys = mem[n].held & UPTO(h_mark);
#else
#ifdef BUG_BURN_NOT_GIVEN
		keys = mem[n].held & OF(1 - n) & UPTO(h_mark);
#else
		keys = mem[n].held & ((OF(1 - n) & UPTO(h_mark)) | (OF(n) & UPTO(mem[n].burned)));
#endif
#endif
#ifndef BUG_BURN_ALL
		keys = keys & ~mem[n].noticed;
#endif
#ifndef BUG_BURN_MEMORY_ONLY
		if
		:: h_mark > disk[n].pmark -> disk[n].pmark = h_mark /* store.AdoptMark(Other) */
		:: else
		fi;
#endif
#ifndef BUG_BURN_SPARES
		mem[n].held = mem[n].held & ~keys;
#endif
		burned[n] = burned[n] | keys
	fi
}

/* onWant: what the peer has used of the keys that were given to it. How many it
 * wants is not modelled: a transfer may begin at any moment. pool.onWant */
inline onWant(n) {
	if
	:: STRANGER(n) -> r_code = NOTSYNCED
	:: else ->
#if defined(FLOOR) && defined(TRANSFER)
		if
		:: h_floor > mem[n].gfloors -> mem[n].gfloors = h_floor
		:: else
		fi
#endif
		skip
	fi
}

/* validate1: the slave's verdict on one block. pool.judge */
inline validate1(n, b) {
	if
	:: died || !asked || !((h_act >> (b)) & 1)
	:: else ->
		if
		:: !((disk[n].rcv | disk[n].act) >> (b) & 1) && (b) >= disk[n].newest -> asked = false /* missing; so are all later ones */
		:: !((disk[n].rcv | disk[n].act) >> (b) & 1) && (b) < disk[n].newest -> r_rcv = r_rcv | (1 << (b)) /* never */
#ifndef BUG_ANY_PROOF
		:: ((disk[n].rcv | disk[n].act) >> (b) & 1) && ((bad >> (b)) & 1) -> /* mismatch */
			disk[n].rcv = disk[n].rcv & ~(1 << (b)); disk[n].act = disk[n].act & ~(1 << (b)); r_rcv = r_rcv | (1 << (b)); crashpoint()
#endif
		:: else -> /* store.Activate */
			disk[n].rcv = disk[n].rcv & ~(1 << (b)); disk[n].act = disk[n].act | (1 << (b)); r_act = r_act | (1 << (b)); crashpoint()
		fi
	fi
}

/* onValidate. pool.onValidate, forsake */
inline onValidate(n) {
	if
	:: STRANGER(n) -> r_code = NOTSYNCED
	:: else ->
#if K / KPB > 1
		if
		:: h_act == 2 && (disk[n].rcv & 1) -> disk[n].rcv = disk[n].rcv & ~1; crashpoint() /* the master has none */
		:: else
		fi;
#endif
		asked = true;
		validate1(n, 0);
#if K / KPB > 1
		validate1(n, 1)
#endif
	fi
}

/* serve: n takes the request in h_, of the peer. kma.serve */
inline serve(n) {
	r_code = OK; r_act = 0; r_rcv = 0; ok = true;
	if
#ifdef BUG_SYNC_FOR_ANYONE
	:: h_type == SYNC -> meet(n)
#else
	:: h_type == SYNC && h_to == mem[n].inst -> mem[n].named = true; meet(n)
	:: h_type == SYNC && h_to != mem[n].inst /* it was meant for nobody yet, or for a process that is gone */
#endif
	:: h_type == LEASE -> onLease(n)
	:: h_type == BURN -> onBurn(n)
	:: h_type == WANT -> onWant(n)
	:: h_type == VALIDATE -> onValidate(n)
	fi;
	drop(n)
}

/* conclude1: the master's end of M102 for one block. pool.conclude */
inline conclude1(n, b) {
	if
	:: died || !((disk[n].rcv >> (b)) & 1)
	:: !died && ((disk[n].rcv >> (b)) & 1) && ((h_act >> (b)) & 1) ->
		disk[n].rcv = disk[n].rcv & ~(1 << (b)); disk[n].act = disk[n].act | (1 << (b)); crashpoint()
	:: !died && ((disk[n].rcv >> (b)) & 1) && ((h_rcv >> (b)) & 1) ->
		disk[n].rcv = disk[n].rcv & ~(1 << (b)); crashpoint()
	:: else
	fi
}

/* answered: n takes the answer to its call, which is in h_. */
inline answered(n) {
	if
	:: h_type == SYNC -> /* pool.afterSync */
		if
		:: mem[n].changed && mem[n].pinst != h_from -> endcall(n)
		:: else ->
			if
			:: h_to == mem[n].inst -> mem[n].named = true
			:: h_to != mem[n].inst && (h_pgen > disk[n].gen || (h_pgen == disk[n].gen && !mem[n].named)) ->
				/* our store was restored: start with a later generation. pool.outgrow */
				CLAIM(sync_gets_on, refused[n] < 1);
				refused[n]++;
#ifndef BUG_REFUSED_FOR_EVER
				disk[n].gen = h_pgen + 1; mem[n].named = false
#else
				skip
#endif
			:: else
			fi;
			meet(n);
			if
			:: died || !ok -> endcall(n)
#ifndef BUG_SYNC_FOR_ANYONE
			:: !died && ok && h_to != mem[n].inst -> endcall(n) /* it has not met us: ask again, naming it */
#endif
#ifndef BUG_NO_BURN
			:: !died && ok && h_to == mem[n].inst && mem[n].burndue ->
				CLEAR(cur[n]);
				cur[n].type = BURN; link(n); cur[n].gen = disk[n].gen; cur[n].mark = disk[n].mark;
				send(n)
#endif
			:: else -> mem[n].synced = true; mem[n].burndue = false; endcall(n)
			fi
		fi
	:: h_type == BURN -> /* pool.sync, its end */
		if
		:: !mem[n].changed && h_code == OK -> mem[n].synced = true; mem[n].burndue = false
		:: else
		fi;
		endcall(n)
	:: h_type == LEASE -> /* pool.refill, closeLease, publish, destroyMissing */
		if
		:: h_code == NOTSYNCED -> mem[n].synced = false
		:: h_code == CONFLICT && !mem[n].changed ->
			if
			:: mem[n].pgive == 1 -> mem[n].held = mem[n].held & ~mem[n].pkeys
			:: else
			fi;
			forget(n)
		:: h_code == OK && !mem[n].changed ->
			keys = mem[n].pkeys & KEYS(h_act);
			if
			:: mem[n].pgive == 1 -> mem[n].held = mem[n].held & ~keys
			:: mem[n].pgive == 2 -> skip
			:: mem[n].pgive == 0 -> mem[n].own = mem[n].own | (mem[n].pkeys & ~keys)
			fi;
			forget(n);
			disk[n].act = disk[n].act & ~h_act
		:: else
		fi;
		endcall(n)
	:: h_type == WANT -> /* pool.want */
		if
		:: h_code == NOTSYNCED -> mem[n].synced = false
		:: else
		fi;
		endcall(n)
	:: h_type == VALIDATE -> /* pool.validate */
		if
		:: h_code == NOTSYNCED -> mem[n].synced = false
		:: h_code == OK && !mem[n].changed ->
			conclude1(n, 0);
#if K / KPB > 1
			conclude1(n, 1)
#endif
		:: else
		fi;
		endcall(n)
	fi;
	drop(n)
}

/* openLease: the next keys of ours, from disk to memory: to own with the peer's
 * acknowledgement, or, when they are given, at once to held. pool.openLease */
inline openLease(n, giving) {
	keys = ACTIVE(n) & OF(n);
	if
	:: keys & 1 -> p = 1
	:: keys & 2 -> p = 2
	:: keys & 4 -> p = 3
	:: keys & 8 -> p = 4
	fi;
	keys = keys & UPTO(p);
	SAY(("%d opens a lease, purpose %d, (%d, %d]\n", n, giving, disk[n].mark, p));
	mem[n].pkeys = keys; mem[n].pafter = disk[n].mark; mem[n].pmark = p; mem[n].pseqs = BLOCKS(keys); mem[n].pgive = giving;
#ifdef FLOOR
	/* pool.usedUpTo */
	mem[n].floor = disk[n].mark;
	if
	:: (mem[n].own & OF(n) & 1) -> mem[n].floor = 0
	:: !(mem[n].own & OF(n) & 1) && (mem[n].own & OF(n) & 2) -> mem[n].floor = (mem[n].floor < 1 -> mem[n].floor : 1)
	:: !(mem[n].own & OF(n) & 3) && (mem[n].own & OF(n) & 4) -> mem[n].floor = (mem[n].floor < 2 -> mem[n].floor : 2)
	:: !(mem[n].own & OF(n) & 7) && (mem[n].own & OF(n) & 8) -> mem[n].floor = (mem[n].floor < 3 -> mem[n].floor : 3)
	:: else
	fi;
#endif
	if
#ifdef BUG_USE_WHILE_GIVING
	:: giving == 1 -> mem[n].own = mem[n].own | keys; transit = transit | keys
#else
	:: giving == 1 -> mem[n].held = mem[n].held | keys; transit = transit | keys
#endif
#ifdef EXPIRY
#ifdef BUG_EXPIRE_IN_MEMORY
	:: giving == 2 -> mem[n].own = mem[n].own | keys; expired = expired | keys
#else
	:: giving == 2 -> expired = expired | keys; mem[n].pseqs = 0 /* store.Expire(Own) */
#endif
#endif
	:: else
	fi;
#ifdef BUG_MARK_IN_MEMORY
	skip;
#else
	disk[n].mark = p; /* store.Advance(Own), durable */
#endif
#ifdef BUG_HAND_OUT_BEFORE_ACK
	if
	:: giving == 0 -> mem[n].own = mem[n].own | keys; mem[n].pkeys = 0
	:: else
	fi;
#endif
	drop(n)
}

inline sendLease(n) {
	CLEAR(cur[n]);
	cur[n].type = LEASE; link(n); cur[n].gen = disk[n].gen; cur[n].after = mem[n].pafter; cur[n].mark = mem[n].pmark;
	cur[n].act = mem[n].pseqs; cur[n].give = mem[n].pgive;
#ifdef FLOOR
	cur[n].floor = mem[n].floor;
#endif
	send(n)
}

#if defined(FLOOR) && defined(TRANSFER)
/* sendWant, with the position up to which no given key waits to be taken.
 * pool.want */
inline sendWant(n) {
	CLEAR(cur[n]);
	cur[n].type = WANT; link(n);
	keys = mem[n].own & OF(1 - n);
	mem[n].gfloor = disk[n].pmark;
	if
	:: keys & 1 -> mem[n].gfloor = 0
	:: !(keys & 1) && (keys & 2) -> mem[n].gfloor = 1
	:: !(keys & 3) && (keys & 4) -> mem[n].gfloor = 2
	:: !(keys & 7) && (keys & 8) -> mem[n].gfloor = 3
	:: else
	fi;
	cur[n].floor = mem[n].gfloor;
	send(n)
}

/* Whether a key that was taken may be put back. pool.putBack */
#ifdef BUG_PUT_BACK_GIVEN
#define TAKEABLE(n) (!(mem[n].taken & UPTO(mem[n].burned)) && !(mem[n].taken & UPTO(mem[n].floor)))
#else
#define TAKEABLE(n) (!(mem[n].taken & OF(n) & (UPTO(mem[n].burned) | UPTO(mem[n].floor))) && \
	!(mem[n].taken & OF(1 - n) & (UPTO(mem[n].gburned) | UPTO(mem[n].gfloor))))
#endif
/* The keys that are taken and of this session. */
#define TAKEN(n) (mem[n].taken & ~(OF(n) & UPTO(mem[n].burned)) & ~(OF(1 - n) & UPTO(mem[n].gburned)))
#else
#define TAKEABLE(n) (!(mem[n].taken & UPTO(mem[n].burned)) && !(mem[n].taken & UPTO(mem[n].floor)))
#define TAKEN(n) (mem[n].taken & ~UPTO(mem[n].burned))
#endif

/* oneof: k is one key of keys, any. */
inline oneof() {
	if
	:: keys & 1 -> k = 1
	:: keys & 2 -> k = 2
	:: keys & 4 -> k = 4
	:: keys & 8 -> k = 8
	fi
}

#define QUIET(n) (mem[n].synced && call[n] == IDLE && !mem[n].pkeys)

/* claims hold after every step; some of them only when the two have nothing left
 * to say to one another. */
inline claims() {
#ifndef SUPPLY_ONLY
	CLAIM(noticed_stays, !(avail[A] & ~mem[A].held) && !(avail[B] & ~mem[B].held));
	if
	:: QUIET(A) && QUIET(B) && !(disk[A].rcv & (disk[B].rcv | disk[B].act)) ->
		CLAIM(active_on_both_or_neither, ACTIVE(A) == ACTIVE(B));
#ifdef FLOOR
		CLAIM(leased_on_both_or_neither, !((mem[A].own | TAKEN(A)) & ~mem[B].held) && !((mem[B].own | TAKEN(B)) & ~mem[A].held))
#else
		CLAIM(leased_on_both_or_neither, mem[A].own == (mem[B].held & ~gave[A]) && mem[B].own == (mem[A].held & ~gave[B]));
		CLAIM(stranded_on_both, !(mem[B].held & gave[A] & ~mem[A].issued & ~mem[B].noticed) && !(mem[A].held & gave[B] & ~mem[B].issued & ~mem[A].noticed))
#endif
	:: else
	fi;
#endif
#ifdef BREADTH
	 h_type = 0; h_code = 0; h_from = 0; h_to = 0; h_gen = 0; h_pgen = 0; h_mark = 0; h_after = 0; h_act = 0; h_rcv = 0; h_newest = 0; h_floor = 0; h_give = 0;
	r_code = 0; r_act = 0; r_rcv = 0; keys = 0; p = 0; k = 0; died = 0; ok = 0; fresh = 0; other = 0; asked = 0;
#endif
	skip
}

proctype node(byte n; byte m) {
end:
	do
	/* The network: a request comes, or is lost; so is an answer. */
	:: atomic { call[m] == ASKED ->
		READ(cur[m]);
		SAY(("%d takes the request %d of %d: from %d to %d gen %d mark %d after %d act %d rcv %d newest %d give %d\n", n, h_type, m, h_from, h_to, h_gen, h_mark, h_after, h_act, h_rcv, h_newest, h_give));
		serve(n);
		if
		:: died -> endcall(m); start(n)
		:: !died -> endcall(m) /* the answer is lost */; SAY(("  the answer is lost\n"))
		:: !died ->
			if
			:: h_type == SYNC -> say(n, m)
			:: h_type != SYNC -> CLEAR(cur[m]); cur[m].type = h_type; cur[m].code = r_code; cur[m].act = r_act; cur[m].rcv = r_rcv
			fi;
			call[m] = ANSWERED
		fi;
		claims() }
	:: atomic { late[m].type != 0 ->
		READ(late[m]); SAY(("%d takes the late request %d of %d: from %d to %d gen %d mark %d after %d act %d rcv %d newest %d give %d\n", n, h_type, m, h_from, h_to, h_gen, h_mark, h_after, h_act, h_rcv, h_newest, h_give)); serve(n);
		if
		:: died -> start(n)
		:: else
		fi;
		claims() }
	:: atomic { call[n] == ASKED -> endcall(n); SAY(("%d: the request or its answer is lost\n", n)); claims() }
	:: atomic { call[n] == ANSWERED ->
		READ(cur[n]);
		SAY(("%d takes the answer to %d: code %d mark %d after %d act %d rcv %d\n", n, h_type, h_code, h_mark, h_after, h_act, h_rcv));
		answered(n);
		if
		:: died -> start(n)
		:: else
		fi;
		claims() }

	/* pool.step */
	:: atomic { call[n] == IDLE && !mem[n].synced -> say(n, n); SAY(("%d asks SYNC gen %d mark %d peer mark %d act %d rcv %d\n", n, disk[n].gen, disk[n].mark, disk[n].pmark, disk[n].act, disk[n].rcv)); send(n); claims() }
#ifdef M102
	:: atomic { call[n] == IDLE && mem[n].synced && n == A && disk[n].rcv -> /* pool.validate */
		CLEAR(cur[n]);
		cur[n].type = VALIDATE; link(n); cur[n].act = disk[n].rcv;
		send(n); claims() }
	:: atomic { disk[n].newest < NB -> /* Agent.intake, store.PutBlock */
		disk[n].rcv = disk[n].rcv | (1 << disk[n].newest); disk[n].newest++; drop(n); claims() }
#endif
	:: atomic { call[n] == IDLE && mem[n].synced && !mem[n].pkeys && (ACTIVE(n) & OF(n)) -> openLease(n, 0); sendLease(n); claims() }
	:: atomic { call[n] == IDLE && mem[n].synced && mem[n].pkeys -> sendLease(n); claims() }
#ifdef EXPIRY
	:: atomic { call[n] == IDLE && mem[n].synced && !mem[n].pkeys && (ACTIVE(n) & OF(n)) -> openLease(n, 2); sendLease(n); claims() }
#endif
#ifdef TRANSFER
	:: atomic { call[n] == IDLE && mem[n].synced && !mem[n].pkeys && (ACTIVE(n) & OF(n)) -> openLease(n, 1); sendLease(n); claims() }
#ifdef FLOOR
	:: atomic { call[n] == IDLE && mem[n].synced -> sendWant(n); claims() }
#endif
#ifdef BUG_RECLAIM
	:: atomic { call[n] == IDLE && mem[n].pkeys && mem[n].pgive ->
		mem[n].own = mem[n].own | mem[n].pkeys; mem[n].held = mem[n].held & ~mem[n].pkeys; forget(n); claims() }
#endif
#endif

	/* ksa.GetKey, with kma.Take */
#ifdef FLOOR
	:: atomic { mem[n].own && !mem[n].taken ->
		keys = mem[n].own; oneof(); mem[n].own = mem[n].own & ~k; mem[n].taken = k; claims() }
	:: atomic { mem[n].taken -> /* pool.putBack */
		if
#ifdef BUG_PUT_BACK_BELOW_FLOOR
		:: !(mem[n].taken & UPTO(mem[n].burned)) -> mem[n].own = mem[n].own | mem[n].taken
#else
		:: TAKEABLE(n) -> mem[n].own = mem[n].own | mem[n].taken
#endif
		:: else
		fi;
		mem[n].taken = 0; claims() }
	:: atomic { mem[n].taken -> keys = mem[n].taken; mem[n].taken = 0;
#else
	:: atomic { mem[n].own -> keys = mem[n].own;
#endif
		oneof();
		SAY(("%d supplies key %d\n", n, k));
#ifndef TRANSIT_ONLY
		CLAIM(once_per_side, !(gave[n] & k) && !(got[n] & k));
		CLAIM(one_owner, !(gave[m] & k));
		CLAIM(expired_stays_gone, !(expired & k));
#endif
		CLAIM(not_in_transfer, !(transit & k));
		CLAIM(same_bytes, !(KEYS(bad) & k));
		mem[n].own = mem[n].own & ~k; gave[n] = gave[n] | k; mem[n].issued = mem[n].issued | k; claims() }

	/* Supply notices: n sends one (Agent.sendBatch, or Issued for a pull); one
	 * comes, and its sender may learn that (Agent.Receive, queue.done). */
	:: atomic { mem[n].issued & ~sent[n] -> keys = mem[n].issued & ~sent[n]; oneof(); sent[n] = sent[n] | k; claims() }
	:: atomic { sent[m] -> keys = sent[m]; oneof(); SAY(("%d gets the notice of key %d\n", n, k));
		mem[n].noticed = mem[n].noticed | k;
		avail[n] = avail[n] | (k & mem[n].held);
		if
		:: mem[m].issued = mem[m].issued & ~k
		:: true
		fi;
		claims() }
	/* A notice expires: Agent.sweep, expire. */
	:: atomic { mem[n].noticed -> keys = mem[n].noticed; oneof(); SAY(("%d: the notice of key %d expires\n", n, k));
		mem[n].noticed = mem[n].noticed & ~k; avail[n] = avail[n] & ~k;
#ifndef BUG_EXPIRE_KEEPS_KEY
		mem[n].held = mem[n].held & ~k;
#endif
		claims() }

	/* ksa.GetKeyWithID, with kma.Claim */
#ifdef BUG_NO_NOTICE
	:: atomic { mem[n].held -> keys = mem[n].held; oneof();
#else
	:: atomic { mem[n].noticed & mem[n].held -> keys = mem[n].noticed & mem[n].held; oneof();
#endif
		SAY(("%d fetches key %d\n", n, k));
		CLAIM(notice_first, (mem[n].noticed & k) != 0);
		CLAIM(once_per_side, !(gave[n] & k) && !(got[n] & k));
		CLAIM(not_in_transfer, !(transit & k));
		CLAIM(burned_stays_gone, !(burned[n] & k));
		CLAIM(same_bytes, !(KEYS(bad) & k));
		mem[n].held = mem[n].held & ~k; mem[n].noticed = mem[n].noticed & ~k; avail[n] = avail[n] & ~k; got[n] = got[n] | k; claims() }

#ifdef FLOOR
	/* A notice that could not be sent has expired at its sender: queue.head. */
	:: atomic { mem[n].issued -> keys = mem[n].issued; oneof(); mem[n].issued = mem[n].issued & ~k; claims() }
	/* pool.sweep: longer after a floor was told than anything below it lives. */
	:: atomic { mem[n].held & OF(1 - n) & UPTO(mem[n].floors) & ~mem[n].noticed &&
		!((mem[m].taken | mem[m].issued) & OF(1 - n) & UPTO(mem[n].floors)) ->
		mem[n].held = mem[n].held & ~(OF(1 - n) & UPTO(mem[n].floors) & ~mem[n].noticed); claims() }
#ifdef TRANSFER
	:: atomic { mem[n].held & OF(n) & UPTO(mem[n].gfloors) & ~mem[n].noticed &&
		!((mem[m].taken | mem[m].issued) & OF(n) & UPTO(mem[n].gfloors)) ->
		mem[n].held = mem[n].held & ~(OF(n) & UPTO(mem[n].gfloors) & ~mem[n].noticed); claims() }
#endif
#endif

	/* Faults. */
	:: atomic { crashes > 0 -> crashes--; start(n); SAY(("%d dies and starts, generation %d\n", n, disk[n].gen)); claims() }
	:: atomic { restores > 0 && snapof == 2 -> COPYDISK(snap, disk[n]); snapof = n; SAY(("%d: a copy is made of its disk\n", n)); claims() }
	:: atomic { restores > 0 && snapof == n ->
		restores--; snapof = 3; COPYDISK(disk[n], snap);
		snap.gen = 0; snap.mark = 0; snap.pmark = 0; snap.pgen = 0; snap.newest = 0; snap.rcv = 0; snap.act = 0;
		transit = transit & ~OF(n); expired = expired & ~OF(n);
		start(n); SAY(("%d: the copy of its disk is put back, it starts with generation %d\n", n, disk[n].gen)); claims() }
	od
}

init {
	atomic {
#ifndef M102
		disk[A].newest = NB; disk[A].act = (1 << NB) - 1;
		disk[B].newest = NB; disk[B].act = (1 << NB) - 1;
#else
		if
		:: bad = 0
		:: bad = 1
		fi;
#endif
		start(A); start(B);
		run node(A, B); run node(B, A)
	}
}
