/*
 * qipsec: numbers of the protocol with qipsecd, docs/plugin-protocol.md. A test
 * of the Go package ike/plugin holds them against that end.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QIPSEC_PROTOCOL_H_
#define QIPSEC_PROTOCOL_H_

/** Largest frame, in bytes. */
#define QI_MAX_FRAME 8192

/** Header: magic (4), version (2), type (1), zero (1). */
#define QI_HEADER 8
#define QI_MAGIC 0x51495053
#define QI_ABI 1

/** Types of frames. */
enum {
	QI_HELLO = 1,
	QI_GETKEY = 2,
	QI_SENT = 3,
	QI_BIND = 4,
	QI_ADD_SA = 5,
	QI_QUERY = 6,
	QI_UPDATE = 7,
	QI_END = 8,
	QI_IGNORED = 9,
	QI_ACK = 16,
	QI_OK = 128,
	QI_INSTALLED = 129,
	QI_COMMITTED = 130,
	QI_USE_KEY = 131,
	QI_REFUSE = 132,
};

/** Tags of TLVs. */
enum {
	QI_T_INSTANCE = 1,
	QI_T_VERSION = 2,
	QI_T_MEDIATION = 3,
	QI_T_DEADLINE = 4,
	QI_T_UID = 5,
	QI_T_CONNECTION = 6,
	QI_T_PEER = 7,
	QI_T_KEY_ID = 8,
	QI_T_POLICY = 9,
	QI_T_SPI_I = 10,
	QI_T_SPI_R = 11,
	QI_T_NI = 12,
	QI_T_NR = 13,
	QI_T_INITIATOR_ID = 14,
	QI_T_REPLIER_ID = 15,
	QI_T_FIRST_IDI = 16,
	QI_T_EXCHANGE = 17,
	QI_T_RESPONDER = 18,
	QI_T_TRANSFORMS = 19,
	QI_T_KEYMAT_EI = 20,
	QI_T_KEYMAT_II = 21,
	QI_T_KEYMAT_ER = 22,
	QI_T_KEYMAT_IR = 23,
	QI_T_TOKEN_EI = 24,
	QI_T_TOKEN_II = 25,
	QI_T_TOKEN_ER = 26,
	QI_T_TOKEN_IR = 27,
	QI_T_CONFIRM = 28,
	QI_T_PEER_SPEAKS = 29,
	QI_T_SRC = 30,
	QI_T_DST = 31,
	QI_T_SPI = 32,
	QI_T_PROTOCOL = 33,
	QI_T_MARK = 34,
	QI_T_IF_ID = 35,
	QI_T_REQID = 36,
	QI_T_MODE = 37,
	QI_T_SRC_TS = 38,
	QI_T_DST_TS = 39,
	QI_T_LIFETIME = 40,
	QI_T_ENCR_ALG = 41,
	QI_T_INTEG_ALG = 42,
	QI_T_TOKEN = 43,
	QI_T_ENCR_LEN = 44,
	QI_T_WINDOW = 45,
	QI_T_TFC = 46,
	QI_T_IPCOMP = 47,
	QI_T_ENCAP = 48,
	QI_T_OFFLOAD = 49,
	QI_T_SET_MARK = 50,
	QI_T_LABEL = 51,
	QI_T_ESN = 52,
	QI_T_COPY_DF = 53,
	QI_T_COPY_ECN = 54,
	QI_T_COPY_DSCP = 55,
	QI_T_INITIATOR = 56,
	QI_T_INBOUND = 57,
	QI_T_UPDATE = 58,
	QI_T_NEW_SRC = 59,
	QI_T_NEW_DST = 60,
	QI_T_NEW_ENCAP = 61,
	QI_T_BYTES = 62,
	QI_T_PACKETS = 63,
	QI_T_LAST_USE = 64,
	QI_T_TEXT = 65,
	QI_T_ENCR_KEY = 66,
	QI_T_INTEG_KEY = 67,
	QI_T_OFF = 68,
	QI_T_COUNT = 69,
};

/** Policies. */
enum {
	QI_REQUIRED = 1,
	QI_OPTIONAL = 2,
};

#endif /** QIPSEC_PROTOCOL_H_ */
