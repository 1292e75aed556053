package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

const (
	fileHeader   = 24
	recordHeader = 16
	maxRecord    = 262144 // tcpdump's own bound
	linkEthernet = 1
)

// readCapture calls each with every frame of a classic pcap file; whole is false
// where the capture cut a frame off. A frame is valid until each returns.
func readCapture(r io.Reader, each func(frame []byte, whole bool) error) error {
	var h [fileHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return fmt.Errorf("no pcap file: %w", err)
	}
	var order binary.ByteOrder
	for _, o := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		if m := o.Uint32(h[:]); m == 0xa1b2c3d4 || m == 0xa1b23c4d { // times in µs, ns
			order = o
		}
	}
	if order == nil {
		return errors.New("no pcap file of the classic format")
	}
	if link := order.Uint32(h[20:]) & 0xffff; link != linkEthernet {
		return fmt.Errorf("link type %d, want Ethernet (1)", link)
	}
	var frame []byte
	for n := 1; ; n++ {
		var rec [recordHeader]byte
		_, err := io.ReadFull(r, rec[:])
		if errors.Is(err, io.EOF) {
			return nil
		}
		size, was := order.Uint32(rec[8:]), order.Uint32(rec[12:])
		if err == nil && size > maxRecord {
			err = fmt.Errorf("a record of %d bytes", size)
		}
		if err == nil {
			frame = slices.Grow(frame[:0], int(size))[:size]
			_, err = io.ReadFull(r, frame)
		}
		if err != nil {
			return fmt.Errorf("packet %d cannot be read, the file is damaged or not complete: %w", n, err)
		}
		if err := each(frame, size >= was); err != nil {
			return err
		}
	}
}
