-- The tables of version 1, as they were made before there were migrations.
CREATE TABLE node (
	one BIGINT PRIMARY KEY CHECK (one = 1),
	version BIGINT NOT NULL,
	uuid BYTES NOT NULL,
	generation BIGINT NOT NULL,
	epoch BIGINT NOT NULL,
	proof BYTES NOT NULL
);
CREATE TABLE pool (
	id BYTES PRIMARY KEY,
	peer TEXT NOT NULL,
	role BIGINT NOT NULL,
	class BIGINT NOT NULL,
	newest_seq BIGINT NOT NULL,
	own_mark BIGINT NOT NULL,
	peer_mark BIGINT NOT NULL,
	peer_generation BIGINT NOT NULL,
	epoch BIGINT NOT NULL,
	proof BYTES NOT NULL
);
CREATE TABLE block (
	pool BYTES NOT NULL REFERENCES pool (id),
	seq BIGINT NOT NULL,
	state BIGINT NOT NULL,
	class BIGINT NOT NULL,
	no_pad BIGINT NOT NULL,
	key_count BIGINT NOT NULL,
	byte_count BIGINT NOT NULL,
	algorithm TEXT NOT NULL,
	tag_m BYTES NOT NULL,
	tag_s BYTES NOT NULL,
	digest BYTES NOT NULL,
	own_cut BIGINT NOT NULL,
	peer_cut BIGINT NOT NULL,
	generation BIGINT NOT NULL,
	epoch BIGINT NOT NULL,
	wrap BYTES NOT NULL,
	PRIMARY KEY (pool, seq)
);
CREATE TABLE part (
	pool BYTES NOT NULL,
	seq BIGINT NOT NULL,
	part BIGINT NOT NULL,
	ids BYTES NOT NULL,
	box BYTES NOT NULL,
	PRIMARY KEY (pool, seq, part),
	FOREIGN KEY (pool, seq) REFERENCES block (pool, seq)
);
CREATE TABLE history (
	serial BIGINT PRIMARY KEY,
	time BIGINT NOT NULL,
	pool BYTES NOT NULL,
	side BIGINT NOT NULL,
	first_pos BIGINT NOT NULL,
	last_pos BIGINT NOT NULL,
	key_id BYTES NOT NULL,
	state BIGINT NOT NULL,
	key_count BIGINT NOT NULL,
	detail TEXT NOT NULL
);
CREATE INDEX history_key ON history (key_id);
CREATE TABLE event (
	serial BIGINT PRIMARY KEY,
	time BIGINT NOT NULL,
	severity TEXT NOT NULL,
	code TEXT NOT NULL,
	source TEXT NOT NULL,
	message TEXT NOT NULL,
	action TEXT NOT NULL
)
